"""The shipped table, the fallback to smaller tiles, and the cache of what was tuned."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention.kernels import configs
from flashbias_patch.attention.kernels.configs import Config, Key


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_working", {})
    monkeypatch.setattr(configs, "_loaded", False)


KEY = Key("forward", 90, True, 32, 16, True)


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("half", [True, False])
def test_every_call_finds_a_shipped_tile(kernel, arch, half):
    for block_d in (16, 32, 64, 128):
        for block_r in (0, 16, 32, 64):
            found = configs.candidates(Key(kernel, arch, half, block_d, block_r, True))
            assert len(found) > len(configs.SMALLER)
            assert half or all(config.warps <= 4 for config in found), "tf32x3 and eight warps crash"


def test_what_does_not_fit_is_passed_over_and_remembered():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(config):
        tried.append(config)
        if config != configs.SMALLER[0]:
            raise OutOfResources(1, 0, "shared memory")
        return "done"

    assert configs.first_working(KEY, launch) == "done"
    count = len(tried)
    configs.first_working(KEY, launch)
    assert count > 1 and tried[count:] == [configs.SMALLER[0]]
    with pytest.raises(RuntimeError, match="no tile shape fits"):
        configs._working.clear()
        configs.first_working(KEY, lambda config: (_ for _ in ()).throw(OutOfResources(1, 0, "registers")))


def test_tuned_choices_survive_on_disk(monkeypatch):
    chosen = Config(32, 32, 4, 1)
    configs.remember({KEY: chosen})
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_loaded", False)
    assert configs.candidates(KEY)[0] == chosen


@pytest.mark.parametrize("content", ["", "{", "[[1, 2]]", '[[["forward"], [1]]]', "null", "\x00"])
def test_a_corrupt_cache_is_ignored(content):
    path = configs._cache_path()
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        file.write(content)
    assert configs.candidates(KEY)[0] == configs.candidates(KEY)[0]
    configs.remember({KEY: Config(32, 32, 4, 1)})
    with open(path) as file:
        assert len(json.load(file)) == 1


def test_an_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    configs.remember({KEY: Config(32, 32, 4, 1)})
    assert configs.candidates(KEY)[0] == Config(32, 32, 4, 1)
