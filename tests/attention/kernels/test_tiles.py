"""The shipped table, the fallback to smaller tiles, and the cache of what was tuned."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention.kernels import cache, tiles
from flashbias_patch.attention.kernels.tiles import Config, Key
from tests.support import internals

pytestmark = pytest.mark.usefixtures("untuned")
KEY = Key("forward", 90, True, 32, 16, True)


@pytest.mark.parametrize("kernel", tiles.KERNELS)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("half", [True, False])
def test_every_call_finds_a_shipped_tile(kernel, arch, half):
    for block_d in (16, 32, 64, 128):
        for block_r in (0, 16, 32, 64):
            found = tiles.candidates(Key(kernel, arch, half, block_d, block_r, True))
            assert len(found) > len(tiles.SMALLER)
            assert half or all(config.warps <= 4 for config in found), (
                "tf32x3 and eight warps crash"
            )


def test_what_does_not_fit_is_passed_over_and_remembered():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(config):
        tried.append(config)
        if config != tiles.SMALLER[0]:
            raise OutOfResources(1, 0, "shared memory")
        return "done"

    assert tiles.first_working(KEY, launch) == "done"
    count = len(tried)
    tiles.first_working(KEY, launch)
    assert count > 1 and tried[count:] == [tiles.SMALLER[0]]
    with pytest.raises(RuntimeError, match="no tile shape fits"):
        internals.working_tiles().clear()
        tiles.first_working(
            KEY, lambda config: (_ for _ in ()).throw(OutOfResources(1, 0, "registers"))
        )


def test_tuned_choices_survive_on_disk(monkeypatch):
    chosen = Config(32, 32, 4, 1)
    tiles.remember({KEY: chosen})
    internals.reread_tiles(monkeypatch)
    assert tiles.candidates(KEY)[0] == chosen


def test_a_forced_shape_is_the_only_one_and_leaves_no_trace():
    from triton.runtime.errors import OutOfResources

    def no_room(config):
        raise OutOfResources(1, 0, "shared memory")

    plain, other = tiles.candidates(KEY), KEY._replace(kernel="keys")
    one, two = Config(16, 32, 4, 1), Config(32, 16, 4, 1)
    with pytest.raises(ZeroDivisionError), tiles.forced(KEY, one):
        assert tiles.candidates(KEY) == [one] and len(tiles.candidates(other)) > 1
        with tiles.forced(KEY, two):
            assert tiles.first_working(KEY, lambda config: config) == two
            with pytest.raises(RuntimeError, match="no tile shape fits"):
                tiles.first_working(KEY, no_room)
        assert tiles.candidates(KEY) == [one]
        raise ZeroDivisionError
    assert tiles.candidates(KEY) == plain and not internals.working_tiles()
    with tiles.forced(KEY._replace(arch=0), one):  # the interpreter's too
        assert tiles.candidates(KEY._replace(arch=0)) == [one]


def test_the_generation_counts_changes_of_results():
    from triton.runtime.errors import OutOfResources

    def count(action):
        before = tiles.generation
        action()
        return tiles.generation - before

    def only(config):
        def launch(given):
            if given != config:
                raise OutOfResources(1, 0, "shared memory")

        return lambda: tiles.first_working(KEY, launch)

    def force():
        with tiles.forced(KEY, Config(16, 16, 4, 1)):
            inside.append(tiles.generation)

    inside, start = [], tiles.generation
    best = tiles.candidates(KEY)[0]
    assert count(only(best)) == 0, "what was the first candidate stays it"
    assert count(lambda: tiles.candidates(KEY)) == 0
    assert count(force) == 2 and inside[0] == start + 1
    assert count(lambda: tiles.remember({KEY: Config(32, 32, 4, 1)})) > 0
    internals.working_tiles().clear()
    assert count(only(tiles.SMALLER[-1])) > 0, "another one than the first works"
    assert count(only(tiles.SMALLER[-1])) == 0
    assert count(tiles.forget) > 0 and tiles.candidates(KEY)[0] == best


def elsewhere(monkeypatch, name, value):
    places = dict(zip(cache.NAMES, cache.here()))
    monkeypatch.setattr(
        cache, "here", lambda: tuple({**places, name: value}[each] for each in cache.NAMES)
    )


def again(monkeypatch):
    internals.reread_tiles(monkeypatch)
    return tiles.candidates(KEY)[0]


@pytest.mark.parametrize("name", cache.NAMES)
def test_what_another_gpu_or_version_tuned_is_kept_and_not_used(monkeypatch, name):
    theirs, ours, shipped = Config(32, 32, 4, 1), Config(16, 32, 4, 1), tiles.candidates(KEY)[0]
    with monkeypatch.context() as patch:
        elsewhere(patch, name, "another")
        tiles.remember({KEY: theirs})
        assert again(patch) == theirs
    assert again(monkeypatch) == shipped
    tiles.remember({KEY: ours})
    assert again(monkeypatch) == ours
    assert len(cache.rows()) == 2
    tiles.forget([KEY])
    assert again(monkeypatch) == shipped and len(cache.rows()) == 1
    elsewhere(monkeypatch, name, "another")
    assert again(monkeypatch) == theirs
    assert tiles.forget() and again(monkeypatch) == shipped and not tiles.forget()


def test_rows_of_the_old_format_and_damaged_ones_are_dropped(monkeypatch):
    good, shipped = Config(32, 32, 4, 1), tiles.candidates(KEY)[0]
    tiles.remember({KEY: good})
    (row,) = cache.rows()
    damaged = [
        {**row, "config": numbers}
        for numbers in (
            [48, 32, 4, 1],
            [32, 32, 4],
            [32, 32, 4, 99],
            [True] * 4,
            [32, 32, 64, 1],
            ["a", 32, 4, 1],
            [1024, 32, 4, 1],
            None,
        )
    ]
    for bad in ([list(KEY), list(good)], {**row, "gpu": 7}, {**row, "key": None}, *damaged):
        with open(cache.path(), "w") as file:
            json.dump([bad], file)
        assert again(monkeypatch) == shipped, bad
        with open(cache.path(), "w") as file:
            json.dump([bad, row], file)
        assert again(monkeypatch) == good, bad
    with open(cache.path(), "w") as file:
        json.dump([[list(KEY), list(good)]], file)
    tiles.remember({KEY: good})
    assert len(cache.rows()) == 1


@pytest.mark.parametrize("content", ["", "{", "[[1, 2]]", '[[["forward"], [1]]]', "null", "\x00"])
def test_a_corrupt_cache_is_ignored(content):
    path = cache.path()
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        file.write(content)
    assert tiles.candidates(KEY)[0] == tiles.candidates(KEY)[0]
    tiles.remember({KEY: Config(32, 32, 4, 1)})
    with open(path) as file:
        assert len(json.load(file)) == 1


def test_an_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tiles.remember({KEY: Config(32, 32, 4, 1)})
    assert tiles.candidates(KEY)[0] == Config(32, 32, 4, 1)
