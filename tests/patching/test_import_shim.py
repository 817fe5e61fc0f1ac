"""Modules of a repository: their imports of flash_attn, which builtins they see, when they are
patched again."""

from __future__ import annotations

import builtins
import gc
import importlib
import sys
import types
import weakref

import numpy
import pytest
import torch

import flashbias_patch
from flashbias_patch.patching import flash_attn_shim, install
from tests.patching.test_install import outer_class, registry_module
from tests.support import internals
from tests.support.reference import attention


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a module of a repository and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def module(source, name=None):
        name = name or f"fork_{tmp_path.name.replace('-', '_')}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield module
    for name in names:
        sys.modules.pop(name, None)


# -- which imports get a stand-in ------------------------------------------------------------------

F_FUNC = "from flash_attn import flash_attn_func as f"
F_OLD = "from flash_attn.flash_attn_interface import flash_attn_unpadded_func as f"
HAS = F_FUNC + "\n    HAS = True"
OWN_WAY = {
    "ImportError": f"try:\n    {HAS}\nexcept ImportError:\n    HAS = False\n",
    "bare": f"try:\n    {HAS}\nexcept:\n    HAS = False\n",
    "tuple": f"try:\n    {HAS}\nexcept (OSError, ModuleNotFoundError):\n    HAS = False\n",
    "a name that may hold it": f"E = (ImportError,)\ntry:\n    {HAS}\nexcept E:\n    HAS = False\n",
    "second handler": f"try:\n    {HAS}\nexcept RuntimeError:\n    raise\nexcept Exception as "
    "e:\n    HAS = False\n",
    "raise in a branch": f"HAS = False\ntry:\n    {HAS}\nexcept ImportError as e:\n    if e.name "
    "is None:\n        raise\n",
    "nested": f"HAS = False\ntry:\n  if True:\n    {HAS}\nexcept ImportError:\n    pass\n",
    "suppress": "import contextlib\nHAS = False\nwith contextlib.suppress(ImportError):\n    "
    f"{HAS}\n",
    "find_spec": "import importlib.util\nHAS = False\nif "
    f"importlib.util.find_spec('flash_attn'):\n    {HAS}\n",
    "function": "def use():\n    from flash_attn import flash_attn_func\n"
    "try:\n    use()\n    HAS = True\nexcept ImportError:\n    HAS = False\n",
    "version": "try:\n    import flash_attn\n"
    "    HAS = int(flash_attn.__version__[0])\nexcept ImportError:\n    HAS = False\n",
    "a name that no stand-in has": "try:\n    from flash_attn.bert_padding import unpad_input\n"
    "    from flash_attn.layers.rotary import apply_rotary_emb\n    HAS = True\n"
    "except ImportError:\n    HAS = False\n",
}
NEEDED = {
    "plain": f"{F_FUNC}\n",
    "in a branch": f"if True:\n    {F_FUNC}\n",
    "re-raised": f"try:\n    {F_FUNC}\nexcept ImportError as e:\n    raise ImportError('install "
    "flash-attn') from e\n",
    "exit": f"import sys\ntry:\n    {F_FUNC}\nexcept ImportError:\n    sys.exit('!')\n",
    "finally": f"try:\n    {F_FUNC}\nfinally:\n    pass\n",
    "other errors": f"try:\n    {F_FUNC}\nexcept (KeyError, AttributeError):\n    f = None\n",
    "in the handler, as StreamPETR does": f"try:\n    {F_OLD}\nexcept:\n    {F_FUNC}\n",
    "in the else branch": "try:\n    pass\nexcept ImportError:\n    f = None\nelse:\n    "
    f"{F_FUNC}\n",
    "class body": "class C:\n    from flash_attn import flash_attn_func as f\nf = C.f\n",
    "module": "import flash_attn, os as o\nf = flash_attn.flash_attn_func\n",
    "submodule": "import flash_attn.flash_attn_interface\nf = "
    "flash_attn.flash_attn_interface.flash_attn_func\n",
    "submodule as": "import flash_attn.flash_attn_interface as m\nf = m.flash_attn_func\n",
    "star": "from flash_attn.flash_attn_interface import *\nf = flash_attn_func\n",
    "future": '"""Doc."""\nfrom __future__ import annotations\nfrom flash_attn import '
    "flash_attn_func as f\n",
}


@pytest.mark.parametrize("case", list(OWN_WAY))
def test_code_with_a_way_of_its_own_keeps_it(installed, write, case):
    assert write(OWN_WAY[case]).HAS is False


@pytest.mark.parametrize("case", list(NEEDED))
def test_an_import_that_would_fail_gets_a_stand_in(installed, write, case):
    module = write(NEEDED[case])
    assert module.f is flash_attn_shim.flash_attn_func
    assert "flash_attn" not in sys.modules


def test_the_version_can_be_read(installed, write):
    module = write(
        "import flash_attn\nfrom flash_attn import __version__ as v\nold = int(v.split('.')[0]) "
        "< 2\n"
    )
    assert (
        module.old is False and module.flash_attn.__version__ == module.v == flash_attn_shim.VERSION
    )


def test_a_real_module_without_a_version_is_completed(installed, write, monkeypatch):
    """flash-attn-4 installs a `flash_attn` that holds none of the older names."""
    real = types.ModuleType("flash_attn")
    real.cute = marker = object()
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    module = write("import flash_attn\n")
    assert (
        module.flash_attn.cute is marker
        and module.flash_attn.__version__ == flash_attn_shim.VERSION
    )
    assert not hasattr(real, "__version__")


@pytest.mark.parametrize(
    "name, source",
    [
        ("IPython", "try:\n    from IPython import embed\nexcept ImportError:\n    embed = None\n"),
        (
            "turtle",
            "try:\n    from turtle import down as embed\nexcept ImportError:\n    embed = None\n",
        ),
    ],
)
def test_so_do_imports_of_compatibility_patches(installed, write, monkeypatch, name, source):
    monkeypatch.setitem(sys.modules, name, None)
    assert write(source).embed is None


def test_a_traceback_shows_the_lines_as_written(installed, write):
    module = write(
        "from flash_attn import flash_attn_func, flash_attn_kvpacked_func\nimport os\n\n"
        "def g():\n    return 1 / 0\n"
    )
    with pytest.raises(ZeroDivisionError) as caught:
        module.g()
    assert caught.traceback[-1].lineno == 4 and "1 / 0" in str(caught.traceback[-1].statement)


def test_compiled_files_are_those_of_an_unpatched_process(write, tmp_path):
    """The rewritten code enters no .pyc, and is not read from one."""
    source = "try:\n    import flash_attn\nexcept ValueError:\n    pass\nvalue = 1\n"
    flashbias_patch.install()
    module = write(source)
    assert module.flash_attn.__version__ and not list(
        tmp_path.glob(f"__pycache__/{module.__name__}*")
    )
    flashbias_patch.uninstall()
    del sys.modules[module.__name__]
    with pytest.raises(ImportError):
        importlib.import_module(module.__name__)


# -- builtins --------------------------------------------------------------------------------------


def test_builtins_replaced_later_are_seen(installed, write, monkeypatch):
    module = write(
        "from flash_attn import flash_attn_func\ndef say():\n    return print('hello')\n"
        "def translated():\n    return _('hello')\n"
    )
    monkeypatch.setattr(builtins, "print", lambda *words: words)  # as DETR's setup_for_distributed
    monkeypatch.setattr(builtins, "_", str.upper, raising=False)  # as gettext.install
    assert module.say() == ("hello",) and module.translated() == "HELLO"
    assert module.__builtins__ in (builtins, vars(builtins))


def test_an_import_function_of_the_users_is_called(installed, write, monkeypatch):
    seen, usual = [], builtins.__import__

    def shim(name, *args, **kwargs):
        seen.append(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", shim)
    module = write("from flash_attn import flash_attn_func\nimport json\n")
    assert (
        "flash_attn" in seen
        and "json" in seen
        and module.flash_attn_func is flash_attn_shim.flash_attn_func
    )


@pytest.mark.skipif(hasattr(numpy, "object"), reason="this NumPy still has the aliases")
def test_numpy_is_mended_for_third_parties(installed, write, monkeypatch):
    """`np.float = float` reaches NumPy itself, and names set on NumPy later are seen."""
    for name in ("float", "new_name"):
        monkeypatch.delattr(numpy, name, raising=False)
        monkeypatch.setattr(numpy, name, None, raising=False)
        delattr(numpy, name)
    module = write(
        "import numpy as np\ndef kind():\n    return np.float, np.int(3)\ndef mend():\n    "
        "np.float = set\n"
    )
    assert module.kind() == (float, 3) and not hasattr(numpy, "new_name")
    numpy.new_name = 5
    assert module.np.new_name == 5 and "new_name" in dir(module.np)
    module.mend()
    assert numpy.float is set and module.kind() == (set, 3)
    assert (
        isinstance(module.np, types.ModuleType)
        and module.np.zeros is numpy.zeros
        and module.np.__name__ == "numpy"
    )
    with pytest.raises(AttributeError):
        module.np.no_such_name  # noqa: B018


# -- the functions ---------------------------------------------------------------------------------


def tensors(M=6, N=9, heads=2, kv_heads=2, B=2):
    g = torch.Generator().manual_seed(0)
    sizes = ((B, M, heads, 8), (B, N, kv_heads, 8), (B, N, kv_heads, 8))
    return tuple(torch.randn(size, generator=g, requires_grad=True) for size in sizes)


def distance(M, N):
    return torch.arange(N) - torch.arange(M)[:, None] - (N - M)


def hidden(where):
    return torch.zeros(where.shape, dtype=torch.float64).masked_fill(where, float("-inf"))


SLOPES = torch.tensor([0.5, 1.0])
OPTIONS = {
    "causal": (dict(causal=True), lambda d: hidden(d > 0)),
    "window": (dict(window_size=(2, 1)), lambda d: hidden((d < -2) | (d > 1))),
    "left window": (dict(window_size=(1, -1)), lambda d: hidden(d < -1)),
    "causal window": (dict(causal=True, window_size=(2, 2)), lambda d: hidden((d < -2) | (d > 0))),
    "alibi": (dict(alibi_slopes=SLOPES), lambda d: -SLOPES[None, :, None, None] * d.abs()),
    "alibi of a batch": (
        dict(alibi_slopes=torch.stack([SLOPES, 2 * SLOPES]), causal=True),
        lambda d: -torch.stack([SLOPES, 2 * SLOPES])[..., None, None] * d.abs() + hidden(d > 0),
    ),
    "none": (
        dict(window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False),
        lambda d: None,
    ),
}


@pytest.mark.parametrize("M, N", [(6, 9), (7, 7)])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_options_are_computed(case, M, N):
    given, bias = OPTIONS[case]
    q, k, v = tensors(M, N)
    expected = attention(q, k, v, bias(distance(M, N)))
    gradients = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    packed = (torch.arange(3, dtype=torch.int32) * length for length in (M, N))
    for out in (
        flash_attn_shim.flash_attn_func(q, k, v, **given),
        flash_attn_shim.flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), **given),
        flash_attn_shim.flash_attn_varlen_func(
            *(t.flatten(0, 1) for t in (q, k, v)), *packed, M, N, **given
        ).view_as(q),
    ):
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
        for got, want in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), gradients):
            torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_fewer_heads_of_keys_are_shared():
    q, k, v = tensors(heads=4, kv_heads=2)
    expected = attention(q, *(t.repeat_interleave(2, 2) for t in (k, v)))
    torch.testing.assert_close(
        flash_attn_shim.flash_attn_func(q, k, v), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "option", [{"softcap": 1.0}, {"return_attn_probs": True}, {"deterministic": True}]
)
def test_other_options_are_named_in_the_error(option):
    (name,) = option
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match=name):
        flash_attn_shim.flash_attn_func(q, k, v, **option)
    offsets = torch.tensor([0, 6]), torch.tensor([0, 9]), 6, 9
    with pytest.raises(NotImplementedError, match=name):
        flash_attn_shim.flash_attn_varlen_func(q[0], k[0], v[0], *offsets, **option)
    with pytest.raises(TypeError, match="no_such_option"):
        flash_attn_shim.flash_attn_func(q, k, v, no_such_option=1)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_shim.flash_attn_varlen_func(
            q[0], k[0], v[0], *offsets, block_table=torch.zeros(1)
        )


def test_the_causal_mask_of_flash_attn_1_is_not_that_of_2():
    q, k, v = tensors(7, 7)
    offsets = torch.tensor([0, 7, 14])
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    out = flash_attn_shim.flash_attn_unpadded_func(*flat, offsets, offsets, 7, 7, 0.0, causal=True)
    expected = attention(q, k, v, torch.full((7, 7), float("-inf")).triu(1)).float()
    torch.testing.assert_close(out.view_as(q), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="different lengths"):
        flash_attn_shim.flash_attn_unpadded_func(
            *flat, offsets, torch.tensor([0, 6, 14]), 7, 8, 0.0, causal=True
        )


# -- again, and gone -------------------------------------------------------------------------------


def test_a_purged_library_is_watched_again(installed, write, monkeypatch):
    """A registry that is imported a second time registers classes that are patched; no warning from
    wrapt's list."""
    source = (
        "class Registry:\n    def _register_module(self, module, module_name=None, "
        "force=False):\n        pass\n"
    )
    name = "a_watched_registry"
    seen = []
    internals.on_import_of(name, seen.append, monkeypatch)
    first = write(source, name)
    del sys.modules[name]
    second = importlib.import_module(name)
    assert seen == [first, second] and importlib.reload(second) is second and len(seen) == 3


def test_an_error_of_a_hook_is_logged_and_the_import_goes_on(installed, write, monkeypatch, caplog):
    def broken(module):
        raise RuntimeError("planted")

    name = "a_module_of_a_broken_hook"
    internals.on_import_of(name, broken, monkeypatch)
    assert write("value = 1\n", name).value == 1
    assert f"after the import of {name}: RuntimeError: planted" in caplog.text


def test_classes_are_freed(installed):
    """Classes that the program drops, and after uninstall those that it kept."""
    kept = [outer_class() for _ in range(2)]
    dropped = [outer_class() for _ in range(2)]
    assert all(install.claim(cls) for cls in kept + dropped)
    references = [weakref.ref(cls) for cls in dropped]
    del dropped
    gc.collect()
    assert not any(reference() for reference in references)
    assert sum(
        "test_install" in entry["module"] for entry in flashbias_patch.status()["patched"]
    ) == len(kept)
    flashbias_patch.uninstall()
    references = [weakref.ref(cls) for cls in kept]
    del kept
    gc.collect()
    assert not any(reference() for reference in references)


def test_a_freed_registry_does_not_stop_uninstall(installed):
    module = registry_module("mmcv.utils.registry")
    internals.watch_registry(module)
    del module
    gc.collect()
    flashbias_patch.uninstall()
    assert not flashbias_patch.status()["patched"]


def test_modules_are_freed(installed, write):
    module = write("from flash_attn import flash_attn_func\nimport numpy as np\nkind = np.float\n")
    reference = weakref.ref(module)
    del sys.modules[module.__name__], module
    flashbias_patch.uninstall()
    gc.collect()
    assert reference() is None
