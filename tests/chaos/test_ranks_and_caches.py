"""Two ranks of which one falls back; and Triton tuning caches that are corrupt, unwritable or shared."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flashbias_patch.attention.kernels import configs

from . import two_ranks


def test_one_rank_falling_back_neither_hangs_nor_changes_the_gradients():
    unbroken, fallen = two_ranks.run(broken=False), two_ranks.run(broken=True)
    assert not fallen[0][2] and [f["source"] for f in fallen[1][2]] == ["triton"]
    assert two_ranks.distance(fallen[0][1], fallen[1][1]) == 0.0  # reduced: the same on both
    assert two_ranks.distance(fallen[0][1], unbroken[0][1]) < 1e-4
    for rank in (0, 1):
        assert fallen[rank][0] == pytest.approx(unbroken[rank][0], rel=2e-5)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_working", {})
    monkeypatch.setattr(configs, "_loaded", False)
    return tmp_path / "flashbias_patch" / "tuned.json"


KEY = configs.Key("forward", 90, True, 32, 16, True)
CONFIG = configs.Config(32, 32, 4, 2)


@pytest.mark.parametrize("text", ("", "{", "null", "[[1]]", '[[["forward"], ["x"]]]', "\x00\xff", "[[[], []]]"))
def test_a_corrupt_tuning_cache_is_as_good_as_none(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert configs.candidates(KEY)
    configs.remember({KEY: CONFIG})
    assert configs.candidates(KEY)[0] == CONFIG
    assert json.loads(cache.read_text())  # whole again


def test_an_unwritable_cache_directory_costs_the_cache_only(cache):
    cache.parent.write_text("a file where the directory should be")
    configs.remember({KEY: CONFIG})
    assert configs.candidates(KEY)[0] == CONFIG


def test_two_processes_tuning_at_once(cache):
    source = (
        "import sys\n"
        "from flashbias_patch.attention.kernels import configs as c\n"
        "for i in range(200):\n"
        "    c.remember({c.Key('forward', 90, True, 32, int(sys.argv[1]) + i, True): c.Config(32, 32, 4, 2)})\n"
    )
    environment = {**os.environ, "FLASHBIAS_PATCH": "0", "PYTHONPATH": str(two_ranks.ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", source, str(n)], env=environment) for n in (0, 1000)]
    assert [p.wait(120) for p in processes] == [0, 0]
    assert len(json.loads(cache.read_text())) >= 200
    assert [p.name for p in cache.parent.iterdir()] == ["tuned.json"]  # nothing half-written is left
