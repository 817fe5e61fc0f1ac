"""Compatibility patches on repositories made for the test: each where it is needed, off by name,
inert elsewhere."""

from __future__ import annotations

import importlib
import sys
import types

import numpy
import pytest
import torch

import flashbias_patch
from flashbias_patch import compat, settings
from flashbias_patch.compat import checkpoints, denoising, machine

# what a module of a repository says -> the patch it needs, and what must hold in it
SOURCES = {
    "turtle": (
        "from turtle import down\nfrom tkinter import N\nvalue = 1\n",
        lambda m: m.value == 1,
    ),
    "ipython": ("from IPython import embed\nvalue = 1\n", lambda m: m.value == 1),
    "numpy_aliases": (
        "import numpy as np\nfrom numpy import float32\nvalue = np.zeros(2, np.int)\nkind = "
        "np.object\n",
        lambda m: m.value.dtype == numpy.dtype(int) and m.kind is object,
    ),
    "linear_with_bias": (
        "from torch.nn.modules.linear import _LinearWithBias, Linear\nvalue = _LinearWithBias(2, "
        "2)\n",
        lambda m: isinstance(m.value, torch.nn.Linear) and m.Linear is torch.nn.Linear,
    ),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a repository's module and returns its importer."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def module(source):
        name = f"fork_{tmp_path.name.replace('-', '_')}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return lambda: importlib.import_module(name)

    yield module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def without(monkeypatch):
    """Make top-level modules fail to import, as on a machine that does not have them."""

    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def switch(monkeypatch, value):
    monkeypatch.setenv("FLASHBIAS_COMPAT", value)
    settings.reload()


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_module_that_needs_it_imports(installed, write, without, name):
    without("turtle", "tkinter", "IPython")
    source, holds = SOURCES[name]
    assert holds(write(source)())
    assert list(compat.applied()) == [name]


@pytest.mark.parametrize("setting", ["none", "dn_index"])
@pytest.mark.parametrize("name", list(SOURCES))
def test_switched_off_the_import_fails_as_ever(write, without, monkeypatch, name, setting):
    without("turtle", "tkinter", "IPython")
    switch(monkeypatch, setting)
    flashbias_patch.install()
    if name == "numpy_aliases" and hasattr(numpy, "object"):
        pytest.skip("this NumPy still has the aliases")
    with pytest.raises((ImportError, AttributeError)):
        write(SOURCES[name][0])()
    assert compat.applied() == {}


def test_one_name_switches_one_patch_on(write, without, monkeypatch):
    without("turtle", "tkinter", "IPython")
    switch(monkeypatch, "turtle, numpy_aliases")
    flashbias_patch.install()
    write(SOURCES["turtle"][0])()
    write(SOURCES["numpy_aliases"][0])()
    with pytest.raises(ImportError):
        write(SOURCES["ipython"][0])()


def test_an_unknown_name_is_logged(monkeypatch, caplog):
    switch(monkeypatch, "turtles")
    assert compat.enabled() == ()
    flashbias_patch.install()
    assert "no patch is called turtles" in caplog.text and "turtle" in caplog.text


def test_nothing_global_changes(installed, write, without):
    """Only the importing module sees the names."""
    without("turtle", "tkinter", "IPython")
    for source, _ in SOURCES.values():
        write(source)()
    assert not {"int", "object"} & set(vars(numpy))
    assert sys.modules["turtle"] is None and sys.modules["IPython"] is None
    assert "_LinearWithBias" not in vars(torch.nn.modules.linear)
    with pytest.raises(ImportError):
        importlib.import_module("turtle")


def test_what_is_there_is_used(installed, write, monkeypatch):
    """A real IPython, and a NumPy that has the names, are imported as they are."""
    real = types.ModuleType("IPython")
    real.embed = object()
    monkeypatch.setitem(sys.modules, "IPython", real)
    assert write("from IPython import embed\n")().embed is real.embed
    assert write("import numpy as np\nnp.zeros(1)\n")().np is numpy
    assert compat.applied() == {}


def test_a_leftover_that_is_called_after_all_says_so(installed, write, without):
    without("IPython")
    module = write("from IPython import embed\n")()
    with pytest.raises(ImportError, match="IPython.embed is called"):
        module.embed()


class Elsewhere(torch.Tensor):
    """Stands for a CUDA tensor: it says so, and a CPU tensor refuses it as an index."""

    moved = 0

    @property
    def device(self):
        return torch.device("cuda")

    def cpu(self):
        Elsewhere.moved += 1
        return torch.Tensor.as_subclass(self, torch.Tensor)

    def long(self):
        return self


HEAD = """
class Head:
    def prepare_for_loss(self, mask_dict):
        return mask_dict["batch_idx"].long()[mask_dict["known_indice"].long()]

class Other:
    def prepare(self, mask_dict):
        return mask_dict["batch_idx"]
"""


@pytest.fixture
def mask_dict():
    Elsewhere.moved = 0
    return {
        "batch_idx": torch.tensor([5, 6, 7]),
        "known_indice": torch.tensor([2, 0]).as_subclass(Elsewhere),
    }


@pytest.mark.skipif(
    denoising.TorchFunctionMode is None, reason="torch does this itself before 1.13"
)
def test_indices_from_another_device(installed, write, mask_dict):
    module = write(HEAD)()
    assert module.Head().prepare_for_loss(mask_dict).tolist() == [7, 5] and Elsewhere.moved == 1
    assert not hasattr(module.Other.prepare, "__wrapped__")
    wrapped = module.Head.prepare_for_loss
    assert compat.applied() == {"dn_index": [module.__name__]}
    flashbias_patch.uninstall()
    assert module.Head.prepare_for_loss is wrapped.__wrapped__ and compat.applied() == {}


def test_on_one_device_nothing_is_opened(installed, write, monkeypatch):
    monkeypatch.setattr(denoising, "IndexFromAnyDevice", None)  # would fail if it were used
    head = write(HEAD)().Head()
    assert head.prepare_for_loss(
        {"batch_idx": torch.tensor([5, 6]), "known_indice": torch.tensor([1])}
    ).tolist() == [6]


@pytest.mark.gpu
def test_indices_on_a_real_gpu(installed, write):
    mixed = {
        "batch_idx": torch.tensor([5, 6, 7]),
        "known_indice": torch.tensor([2, 0], device="cuda"),
    }
    head = write(HEAD)().Head
    assert head().prepare_for_loss(mixed).tolist() == [7, 5]
    with pytest.raises(RuntimeError):
        head.prepare_for_loss.__wrapped__(head(), mixed)


class History:
    """As mmengine's HistoryBuffer: an object around an array."""

    def __init__(self, values):
        self.values = values

    def mean(self):
        return self.values.mean()


class Named:
    """Pickles as getattr(owner, name), as the statistics of a HistoryBuffer do."""

    def __init__(self, owner, name):
        self.named = owner, name

    def __reduce__(self):
        return getattr, self.named


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch < 2.6 loads everything",
)
def test_mmengine_checkpoints_load_with_protection_on(tmp_path):
    hub = types.ModuleType("mmengine.logging.history_buffer")
    hub.HistoryBuffer = History
    good, bad = tmp_path / "iter_2.pth", tmp_path / "hostile.pth"
    torch.save(
        {"h": History(numpy.arange(3.0)), "n": numpy.float64(2.0), "mean": Named(History, "mean")},
        good,
    )
    torch.save({"mean": Named(History, "__init__")}, bad)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(good, weights_only=True)
    undo = checkpoints.allow(hub)
    try:
        loaded = torch.load(good, weights_only=True)
        assert (
            loaded["h"].values.tolist() == [0.0, 1.0, 2.0]
            and loaded["n"] == 2.0
            and loaded["mean"] is History.mean
        )
        with pytest.raises(Exception, match="only statistics of HistoryBuffer are allowed"):
            torch.load(bad, weights_only=True)
    finally:
        torch.serialization.add_safe_globals([Mine])
        undo()
        kept = set(torch.serialization.get_safe_globals())
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))
    assert kept == {*before, Mine}, "uninstall leaves what others have declared since"


class Mine:
    """A class that the user declares safe."""


def test_a_library_is_patched_once_per_installation(monkeypatch):
    """Its hook may be called more than once for one import."""
    calls = []
    monkeypatch.setattr(
        checkpoints,
        "allow",
        lambda module: calls.append(module) or (lambda: calls.append("undone")),
    )
    module = types.ModuleType("mmengine.logging.history_buffer")
    compat.on_module(module)
    compat.on_module(module)
    assert calls == [module]
    compat.uninstall()
    compat.on_module(module)
    compat.uninstall()
    assert calls == [module, "undone"] * 2


def test_a_failing_patch_leaves_the_import_alone(installed, write, monkeypatch, caplog):
    def fail(module):
        raise KeyError("broken")

    monkeypatch.setattr(denoising, "wrap", fail)
    assert write(HEAD)().Head
    assert "dn_index failed" in caplog.text


def test_a_known_problem_is_reported_with_its_fix(monkeypatch):
    versions = {"mmcv-full": (1, 7, 2), "mmdet3d": (1, 0, 0)}
    monkeypatch.setattr(machine, "installed_version", versions.get)
    monkeypatch.setattr(
        machine, "source_of", lambda name: "mmcv_maximum_version = '1.7.0'" * (name == "mmdet3d")
    )
    problem, fix = machine.mmcv_assertion()
    assert "mmdet3d asserts mmcv <= 1.7.0" in problem and "1.7.2" in fix
    versions["mmcv-full"] = (1, 6, 0)
    assert machine.mmcv_assertion() is None
    versions.update({"numpy": (2, 0, 0), "torch": (2, 1, 0)})
    assert "numpy<2" in machine.numpy_abi().fix
    versions["torch"] = (2, 3, 0)
    assert machine.numpy_abi() is None
    assert all(len(found) == 2 for found in compat.known_issues())
