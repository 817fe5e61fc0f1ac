"""Two ranks of which one falls back; and Triton tuning caches that are corrupt, unwritable or
shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from flashbias_patch.attention.kernels import tiles
from tests.integration.distributed import two_ranks
from tests.support import internals


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
    internals.forget_tiles(monkeypatch)
    return tmp_path / "flashbias_patch" / "tuned.json"


KEY = tiles.Key("forward", 90, True, 32, 16, True)
CONFIG = tiles.Config(32, 32, 4, 2)


@pytest.mark.parametrize(
    "text", ("", "{", "null", "[[1]]", '[[["forward"], ["x"]]]', "\x00\xff", "[[[], []]]")
)
def test_a_corrupt_tuning_cache_is_as_good_as_none(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert tiles.candidates(KEY)
    tiles.remember({KEY: CONFIG})
    assert tiles.candidates(KEY)[0] == CONFIG
    assert json.loads(cache.read_text())  # whole again


def test_an_unwritable_cache_directory_costs_the_cache_only(cache):
    cache.parent.write_text("a file where the directory should be")
    tiles.remember({KEY: CONFIG})
    assert tiles.candidates(KEY)[0] == CONFIG


@pytest.mark.parametrize("locks", ["here", "refused", "missing"])
def test_two_processes_tuning_at_once(cache, locks):
    """With locks nothing is lost; without, the file stays whole."""
    source = (
        "import sys\n"
        "from flashbias_patch.attention.kernels import cache, tiles as c\n"
        "class NoLocks:\n"
        "    LOCK_EX = LOCK_NB = 0\n"
        "    def flock(*args): raise OSError(95, 'not supported')\n"
        "cache.fcntl = {'here': cache.fcntl, 'refused': NoLocks(), 'missing': None}[sys.argv[2]]\n"
        "for i in range(200):\n"
        "    c.remember({c.Key('forward', 90, True, 32, int(sys.argv[1]) + i, True): "
        "c.Config(32, 32, 4, 2)})\n"
    )
    environment = {**os.environ, "FLASHBIAS_PATCH": "0", "PYTHONPATH": str(two_ranks.ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", source, str(n), locks], env=environment)
        for n in (0, 1000)
    ]
    assert [p.wait(120) for p in processes] == [0, 0]
    found = len(json.loads(cache.read_text()))
    assert found == 400 if locks == "here" else found >= 200
    assert {p.name for p in cache.parent.iterdir()} - {"tuned.json.lock"} == {
        "tuned.json"
    }  # nothing half-written is left
    assert locks == "refused" or not (cache.parent / "tuned.json.lock").exists()


def test_a_lock_that_is_not_given_back_costs_its_wait_only(cache, monkeypatch):
    from flashbias_patch.attention.kernels import cache as disk

    monkeypatch.setattr(disk, "PATIENCE", 0.2)
    cache.parent.mkdir()
    with disk.locked(disk.path() + ".lock", 0) as mine, disk.locked(
        disk.path() + ".lock", 0
    ) as too:
        assert mine and not too
        began = time.monotonic()
        tiles.remember({KEY: CONFIG})
        assert 0.2 <= time.monotonic() - began < 5
    assert len(json.loads(cache.read_text())) == 1
    with disk.locked(disk.path() + ".lock", 0) as mine:
        assert mine


def test_a_lock_whose_holder_died_is_free(cache):
    from flashbias_patch.attention.kernels import cache as disk

    cache.parent.mkdir()
    source = (
        "import os\n"
        "from flashbias_patch.attention.kernels import cache\n"
        "with cache.locked(cache.path() + '.lock', 0) as mine:\n"
        "    os._exit(7 if mine else 8)\n"
    )
    environment = {**os.environ, "FLASHBIAS_PATCH": "0", "PYTHONPATH": str(two_ranks.ROOT)}
    assert subprocess.call([sys.executable, "-c", source], env=environment) == 7
    with disk.locked(disk.path() + ".lock", 0) as mine:
        assert mine
    assert not (cache.parent / "tuned.json.lock").exists()


def test_a_lock_file_that_its_last_holder_removed_is_made_anew(cache, monkeypatch):
    from flashbias_patch.attention.kernels import cache as disk

    cache.parent.mkdir()
    name, flock, removed = disk.path() + ".lock", disk.fcntl.flock, []

    def late(*args):
        if not removed:
            removed.append(os.unlink(name))  # between our opening it and our locking it
        return flock(*args)

    monkeypatch.setattr(disk.fcntl, "flock", late)
    with disk.locked(name, 5) as mine, disk.locked(name, 0) as too:
        assert removed and mine and not too
