"""What a process pays for `import flashbias_patch`, on and off; each case in an interpreter of its
own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code, cwd=None, **env):
    """Run code in a fresh interpreter; returns (stdout, stderr)."""
    full = {k: v for k, v in os.environ.items() if not k.startswith("FLASHBIAS_")}
    full["PYTHONPATH"] = os.pathsep.join([*env.pop("path", []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**full, **env}, cwd=cwd, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


HEAVY = ["torch", "mmcv", "triton", "numpy", "rich", "wrapt"]


def test_import_is_light():
    out, err = python(
        f"import sys, flashbias_patch; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert out == "[]" and err == ""


def test_kernels_of_windows_wait_for_a_call_with_windows():
    """Triton reads the source of each kernel when its module is imported, in the first call."""
    pytest.importorskip("triton", minversion="3.0")
    out, _ = python(
        "import sys, flashbias_patch.attention.kernels.autograd\n"
        "names = ('window_tables', 'window_common', 'window_forward', 'launcher_windows')\n"
        "print([m for m in sys.modules if m.endswith(names)])",
        FLASHBIAS_PATCH="0",
    )
    assert out == "[]"


@pytest.mark.parametrize("value", ["0", "false", "OFF", "no"])
def test_off_touches_nothing(value):
    out, _ = python(
        "import sys; before = list(sys.meta_path), set(sys.path_hooks)\n"
        "import flashbias_patch\n"
        "assert (list(sys.meta_path), set(sys.path_hooks)) == before\n"
        "import torch\n"
        "assert list(sys.meta_path) == before[0] or not any('flashbias' in type(f).__module__ "
        "for f in sys.meta_path)\n"
        "print(flashbias_patch.status()['installed'])",
        FLASHBIAS_PATCH=value,
    )
    assert out == "False"


@pytest.mark.parametrize("value", [None, "1", "true", "On"])
def test_on_waits_for_torch(value):
    env = {} if value is None else {"FLASHBIAS_PATCH": value}
    out, err = python(
        "import sys, flashbias_patch; print('wrapt' in sys.modules, "
        "flashbias_patch.status()['installed'])\n"
        "import torch; from flashbias_patch.patching import install; print('wrapt' in sys.modules, "
        "install.installed())",
        **env,
    )
    assert out.splitlines() == ["False True", "True True"] and err == ""


def test_uninstall_before_torch():
    out, _ = python(
        "import flashbias_patch; flashbias_patch.uninstall(); import torch\n"
        "print(flashbias_patch.status()['installed'])"
    )
    assert out == "False"


def test_a_bad_value_is_one_logged_error_and_the_default():
    out, err = python(
        "import flashbias_patch; from flashbias_patch import settings; "
        "print(settings.current().backend)",
        FLASHBIAS_BACKEND="fastest",
    )
    assert out == "auto" and err.count("FLASHBIAS_BACKEND") == 1 and "reference" in err


def test_log_level_logs_once_even_under_a_root_handler():
    _, err = python(
        "import logging; logging.basicConfig(level='DEBUG'); import flashbias_patch\n"
        "from flashbias_patch import telemetry; telemetry.once('a', 'info', 'said'); "
        "telemetry.once('a', 'info', 'said')",
        FLASHBIAS_LOG_LEVEL="info",
    )
    assert err.count("said") == 1


def test_a_missing_wrapt_does_not_break_the_import_of_torch(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise ImportError('planted')")
    out, err = python(
        "import flashbias_patch, torch; print(torch.zeros(1).item())", path=[str(tmp_path)]
    )
    assert out == "0.0" and err.count("runs unpatched") == 1


def test_public_names_resolve():
    python(
        "import flashbias_patch\n"
        "for name in flashbias_patch.__all__: getattr(flashbias_patch, name)\n"
        "assert set(dir(flashbias_patch)) == set(flashbias_patch.__all__)\n"
        "try: flashbias_patch.nonsense\n"
        "except AttributeError as e: assert 'nonsense' in str(e)\n"
        "else: raise SystemExit(1)"
    )


@pytest.mark.parametrize("on_the_path", [True, False])
def test_sitecustomize_check_of_its_page(on_the_path):
    """The page's command tells a folder that is used from one that is not."""
    folder = ROOT / "sitecustomize_example"
    code = re.search(
        r'^    FLASHBIAS_PATCH=1 python -c "(.*)"$',
        (folder / "README.md").read_text(),
        re.MULTILINE,
    ).group(1)
    assert python(code, path=[str(folder)] * on_the_path, FLASHBIAS_PATCH="1") == (
        str(on_the_path),
        "",
    )


def test_sitecustomize_example(tmp_path):
    """On by FLASHBIAS_PATCH=1 only, and it goes on to the next sitecustomize either way."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    path = [str(ROOT / "sitecustomize_example"), str(tmp_path)]
    code = "import sys; print('flashbias_patch' in sys.modules)"
    assert python(code, path=path)[0].split() == ["theirs", "False"]
    assert python(code, path=path, FLASHBIAS_PATCH="0")[0].split() == ["theirs", "False"]
    assert python(code, path=path, FLASHBIAS_PATCH="1")[0].split() == ["theirs", "True"]
    # and again by hand afterwards
    assert python(
        "import flashbias_patch, torch; print(flashbias_patch.status()['installed'])",
        path=path,
        FLASHBIAS_PATCH="1",
    )[0].split() == ["theirs", "True"]
