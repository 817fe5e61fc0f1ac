"""Finding, wrapping and putting back; what a hook must never break."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch import settings
from flashbias_patch.patching import catalog, install, seams
from tests.support import internals
from tests.support.mini_cmt import MODULE, take_out

TARGETS = {
    "MultiheadAttention",
    "PETRMultiheadAttention",
    "PETRMultiheadFlashAttention",
    "FlashMHA",
    "PETRTransformerDecoderLayer",
}


def names(package="projects"):
    """Patched classes of the repository under test; other tests' modules may be loaded too."""
    return {
        entry["class"]
        for entry in flashbias_patch.status()["patched"]
        if entry["module"].startswith(package)
    }


def test_every_target_of_a_repository_is_found(patched):
    assert names() >= TARGETS


def test_already_imported_modules_are_found(repository):
    module = repository()
    assert not internals.is_patched(module.PETRMultiheadAttention.forward)
    flashbias_patch.install()
    assert names() >= TARGETS - {"FlashMHA"}  # which failed to import without the patches


def test_uninstall_puts_the_identical_objects_back(repository):
    module = repository()
    classes = [getattr(module, name) for name in TARGETS if getattr(module, name, None) is not None]
    before = [vars(cls).get("forward") for cls in classes]
    flashbias_patch.install()
    assert all(vars(cls)["forward"] is not old for cls, old in zip(classes, before))
    flashbias_patch.uninstall()
    assert all(vars(cls).get("forward") is old for cls, old in zip(classes, before))
    assert not flashbias_patch.status()["installed"] and not flashbias_patch.status()["patched"]
    assert not any(
        type(finder).__module__.startswith("flashbias_patch") for finder in sys.meta_path
    )


def test_install_twice_wraps_once_and_again_after_uninstall(patched):
    wrapper = vars(patched.PETRMultiheadAttention)["forward"]
    flashbias_patch.install()
    assert vars(patched.PETRMultiheadAttention)["forward"] is wrapper
    flashbias_patch.uninstall()
    flashbias_patch.install()
    assert names() >= TARGETS - {"FlashMHA"}


def test_reload_patches_the_new_classes(patched):
    old = patched.FlashMHA
    attention = sys.modules[old.__module__]
    importlib.reload(attention)
    assert attention.FlashMHA is not old
    assert internals.is_patched(vars(attention.FlashMHA)["forward"])


def test_targets_setting_narrows(monkeypatch, repository):
    monkeypatch.setenv("FLASHBIAS_TARGETS", "FlashMHA,MultiheadAttention")
    settings.reload()
    flashbias_patch.install()
    repository()
    assert names() == {"FlashMHA", "MultiheadAttention"}


def refusal(cls):
    return next(
        r["reason"]
        for r in flashbias_patch.status()["refused"]
        if (r["module"], r["class"]) == (cls.__module__, cls.__qualname__)
    )


def outer_class(name="PETRMultiheadAttention"):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(
            self,
            query,
            key=None,
            value=None,
            identity=None,
            query_pos=None,
            key_pos=None,
            attn_mask=None,
            key_padding_mask=None,
            **kwargs,
        ):
            return self.attn(
                query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask
            )[0]

    Outer.__name__ = Outer.__qualname__ = name
    return Outer


def test_two_classes_of_one_name(installed):
    first, second = outer_class(), outer_class()
    assert install.claim(first) and install.claim(second)
    assert all(internals.is_patched(vars(cls)["forward"]) for cls in (first, second))


def test_subclasses_are_wrapped_once_each(installed):
    Base = outer_class()

    class Child(Base):
        def forward(
            self, query, key=None, value=None, attn_mask=None, key_padding_mask=None, **kwargs
        ):
            return (
                super().forward(
                    query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask
                )
                * 2
            )

    class Silent(Base):
        pass

    assert install.claim(Base) and install.claim(Child) and install.claim(Silent)
    assert "forward" not in vars(Silent)
    x, mask = torch.randn(3, 1, 8), torch.eye(3, dtype=torch.bool)
    child = Child()
    expected = child.attn(x, x, x, attn_mask=mask)[0] * 2
    torch.testing.assert_close(child(x, x, x, attn_mask=mask), expected)


@pytest.mark.parametrize(
    "forward, reason",
    [
        (lambda self, qkv, cu_seqlens=None: qkv, "expected"),
        (lambda self, query, key, value: query, "attn_mask"),
    ],
)
def test_a_name_is_not_enough(installed, forward, reason):
    Impostor = type("PETRMultiheadAttention", (nn.Module,), {"forward": forward})
    assert not install.claim(Impostor)
    assert vars(Impostor)["forward"] is forward
    assert reason in refusal(Impostor)


def test_a_hook_that_raises_leaves_the_import_alone(installed, repository, monkeypatch, caplog):
    def broken(cls):
        raise RuntimeError("planted")

    monkeypatch.setitem(seams.SEAMS, "outer", broken)
    module = repository()
    assert not names() & {"PETRMultiheadAttention", "MultiheadAttention"}
    assert "planted" in refusal(module.PETRMultiheadAttention)
    lines = [r.message for r in caplog.records if "planted" in r.message]
    assert len(lines) == len(set(lines)) >= 2
    x = torch.randn(3, 1, 8)
    module.PETRMultiheadAttention(8, 2)(x)


@pytest.mark.parametrize(
    "name", ["MultiheadAttention", "PETRMultiheadAttention", "PETRMultiheadFlashAttention"]
)
def test_instances_do_not_notice(patched, repository, name, tmp_path):
    cls = getattr(patched, name)
    module = cls(16, 2)
    x, k = torch.randn(5, 2, 16), torch.randn(7, 2, 16)
    expected = module(x, k, k)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(x, k, k), expected)
        assert isinstance(copied, cls)
    keys = set(module.state_dict())
    torch.save(module.state_dict(), tmp_path / "patched.pt")
    flashbias_patch.uninstall()
    if name == "PETRMultiheadFlashAttention":
        return  # unpatched it has no flash_attn to be built with
    plain = cls(16, 2)
    assert set(plain.state_dict()) == keys
    plain.load_state_dict(torch.load(tmp_path / "patched.pt"))
    torch.testing.assert_close(plain(x, k, k), expected, rtol=1e-4, atol=1e-5)


def test_signatures_are_unchanged(repository):
    module = repository()
    before = {
        name: inspect.signature(getattr(module, name).forward) for name in TARGETS - {"FlashMHA"}
    }
    docs = module.PETRMultiheadAttention.forward.__doc__
    flashbias_patch.install()
    assert {name: inspect.signature(getattr(module, name).forward) for name in before} == before
    assert module.PETRMultiheadAttention.forward.__doc__ == docs


def registry_module(name):
    """A module with mmcv's / mmengine's Registry in it, as far as registration goes."""
    module = types.ModuleType(name)

    class Registry:
        def __init__(self):
            self.module_dict = {}

        def _register_module(self, module, module_name=None, force=False):
            self.module_dict[module_name or module.__name__] = module

        def register_module(self, force=False):
            def decorate(cls):
                self._register_module(module=cls, force=force)
                return cls

            return decorate

    module.Registry = Registry
    return module


@pytest.mark.parametrize("name", sorted(catalog.REGISTRIES))
def test_forks_are_found_by_registration(installed, name):
    module = registry_module(name)
    original = vars(module.Registry)["_register_module"]
    internals.watch_registry(module)
    cls = module.Registry().register_module()(outer_class())
    assert internals.is_patched(vars(cls)["forward"])
    flashbias_patch.uninstall()
    assert vars(module.Registry)["_register_module"] is original


def test_a_core_is_found_beside_its_registered_outer_class(installed, monkeypatch):
    """FlashMHA is in no registry: it is found in the globals of the module whose class is
    registered."""
    fork = types.ModuleType("a_fork_somewhere")
    monkeypatch.setitem(sys.modules, fork.__name__, fork)

    class FlashMHA(nn.Module):
        def forward(self, q, k, v, key_padding_mask=None):
            return q, None

    fork.FlashMHA = FlashMHA
    outer = outer_class("PETRMultiheadFlashAttention")
    outer.__module__ = fork.__name__
    registry = registry_module("mmcv.utils.registry")
    internals.watch_registry(registry)
    registry.Registry().register_module()(outer)
    assert internals.is_patched(vars(FlashMHA)["forward"])


def test_third_party_targets(installed, monkeypatch):
    class Entry:
        name = "theirs"

        @staticmethod
        def load():
            return [("TheirAttention", "outer", ("query", "key", "value"), ("attn_mask",))]

    class Broken(Entry):
        name = "broken"

        @staticmethod
        def load():
            raise ImportError("planted")

    class EntryPoints:
        @staticmethod
        def select(group):
            return [Broken, Entry] if group == catalog.ENTRY_POINT_GROUP else []

    internals.forget_third_parties(monkeypatch)
    monkeypatch.setattr(catalog.importlib.metadata, "entry_points", lambda: EntryPoints)
    assert install.claim(outer_class("TheirAttention"))
    internals.forget_third_parties(monkeypatch)


# -- the flash_attn stand-in -----------------------------------------------------------------------


def test_flash_attn_is_seen_by_its_importers_only(patched):
    assert patched.FlashMHA is not None
    assert "flash_attn" not in sys.modules
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")
    with pytest.raises(ImportError):
        import flash_attn  # noqa: F401


def test_without_the_patches_the_import_fails_as_ever(repository):
    assert repository().FlashMHA is None


@pytest.fixture(autouse=True)
def forget_the_fork():
    yield
    take_out("some_fork")


def write_package(tmp_path, source):
    package = tmp_path / "some_fork"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "attention.py").write_text(source)


def test_a_real_flash_attn_is_never_shadowed(installed, monkeypatch, tmp_path):
    real, interface = (
        types.ModuleType("flash_attn"),
        types.ModuleType("flash_attn.flash_attn_interface"),
    )
    real.__path__ = []
    real.flash_attn_interface = interface
    interface.flash_attn_unpadded_kvpacked_func = marker = object()
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    write_package(
        tmp_path,
        "from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func as a\n"
        "from flash_attn.flash_attn_interface import flash_attn_varlen_kvpacked_func as b\n"
        "from flash_attn.bert_padding import unpad_input as c\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("some_fork.attention")
    from flashbias_patch.patching import flash_attn_shim

    assert module.a is marker
    assert module.b is flash_attn_shim.flash_attn_varlen_kvpacked_func
    assert module.c is flash_attn_shim.unpad_input
    assert sys.modules["flash_attn"] is real and not hasattr(
        interface, "flash_attn_varlen_kvpacked_func"
    )


def test_an_unknown_submodule_of_flash_attn_is_still_missing(installed, monkeypatch, tmp_path):
    write_package(tmp_path, "from flash_attn.no_such_thing import anything\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="flash_attn"):
        importlib.import_module("some_fork.attention")


def test_stand_in_functions_compute():
    from flashbias_patch.attention import flash_bias_attention
    from flashbias_patch.patching import flash_attn_shim

    q, kv = torch.randn(2, 5, 2, 8), torch.randn(2, 7, 2, 2, 8)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    flat, indices, offsets, longest = flash_attn_shim.unpad_input(kv.flatten(2), keep)
    assert longest == 7 and offsets.tolist() == [0, 7, 10]
    torch.testing.assert_close(
        flash_attn_shim.pad_input(flat, indices, 2, 7)[keep], kv.flatten(2)[keep]
    )
    out = flash_attn_shim.flash_attn_varlen_kvpacked_func(
        q.flatten(0, 1), flat.view(-1, 2, 2, 8), torch.tensor([0, 5, 10]), offsets, 5, longest
    )
    expected = flash_bias_attention(q, kv[:, :, 0], kv[:, :, 1], key_padding_mask=~keep)
    torch.testing.assert_close(out.view(2, 5, 2, 8), expected)


def test_module_name_of_the_fixture_is_in_the_catalog():
    assert MODULE in catalog.MODULES


def test_a_wrapper_that_another_tool_wrapped_is_left_by_uninstall(installed):
    cls = outer_class()
    assert install.claim(cls)
    ours = vars(cls)["forward"]

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    cls.forward = theirs
    flashbias_patch.uninstall()
    assert vars(cls)["forward"] is theirs
