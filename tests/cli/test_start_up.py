"""How a Python process of a command starts: the chain of sitecustomize files, PYTHONPATH, other
interpreters."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashbias_patch import launch, settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "sitecustomize_example"
INSTALLED = "import flashbias_patch; print('installed', flashbias_patch.status()['installed'])"


def clean(**env):
    return {
        **{
            k: v
            for k, v in os.environ.items()
            if not k.startswith("FLASHBIAS_") and k != "PYTHONPATH"
        },
        **env,
    }


def python(*words, path=(), cwd=None, **env):
    """Run an interpreter with PYTHONPATH `path`; returns its output, in which there is no
    traceback."""
    env = clean(PYTHONPATH=os.pathsep.join(str(entry) for entry in path), **env)
    done = subprocess.run(
        [sys.executable, *words], env=env, cwd=cwd, text=True, capture_output=True, timeout=120
    )
    assert "Traceback" not in done.stderr and "Error in sitecustomize" not in done.stderr, (
        done.stderr
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).split()


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    return folder


@pytest.fixture
def theirs(tmp_path):
    """A folder with the user's own sitecustomize, which says that it runs."""
    return write(tmp_path / "theirs", "print('theirs')\nREGISTERED = [1]\n")


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copy(EXAMPLE / "sitecustomize.py", tmp_path / "copy")
    return tmp_path / "copy"


def test_the_example_is_the_bootstrap_file():
    assert (EXAMPLE / "sitecustomize.py").read_text() == Path(
        launch.BOOTSTRAP, "sitecustomize.py"
    ).read_text()


def test_the_bootstrap_knows_the_words_for_off():
    source = Path(launch.BOOTSTRAP, "sitecustomize.py").read_text()
    tuples = [
        [getattr(entry, "value", None) for entry in node.elts]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Tuple)
    ]
    assert ["", *settings.FALSE] in tuples


@pytest.mark.parametrize("on", ["1", "0"])
def test_each_sitecustomize_of_a_path_runs_once(theirs, copy, on):
    """The bootstrap, the example folder and a copy of it, in any order, before the user's own."""
    for folders in (
        (launch.BOOTSTRAP, EXAMPLE, copy),
        (copy, launch.BOOTSTRAP),
        (copy, EXAMPLE, launch.BOOTSTRAP),
    ):
        out = python(
            "-c",
            "import sys; print('flashbias_patch' in sys.modules)",
            path=[*folders, theirs, ROOT],
            FLASHBIAS_PATCH=on,
        )
        assert out == ["theirs", str(on == "1")], folders


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_chain_of_another_tool_ends(theirs, tmp_path, order):
    """As ddtrace and others do: execute whichever sitecustomize is not one's own, ours once more
    included."""
    wrapper = write(
        tmp_path / "wrapper",
        (
            "import os, sys\nfrom importlib.machinery import PathFinder\nfrom importlib.util "
            "import module_from_spec\n"
            "own = os.path.dirname(os.path.abspath(__file__))\nprint('wrapper')\n"
            "spec = PathFinder.find_spec('sitecustomize', [p for p in sys.path if "
            "os.path.abspath(p) != own])\n"
            "spec.loader.exec_module(module_from_spec(spec))\n"
        ),
    )
    pair = [wrapper, launch.BOOTSTRAP] if order == "before" else [launch.BOOTSTRAP, wrapper]
    out = python("-c", INSTALLED, path=[*pair, theirs, ROOT], FLASHBIAS_PATCH="1")
    assert out == ["wrapper", "theirs", "installed", "True"]


def test_import_sitecustomize_finds_the_users(theirs, copy):
    code = (
        "import sitecustomize, sys; print(sitecustomize.REGISTERED, "
        "sys.modules['sitecustomize'] is sitecustomize)"
    )
    assert python("-c", code, path=[launch.BOOTSTRAP, copy, theirs, ROOT], FLASHBIAS_PATCH="1") == [
        "theirs",
        "[1]",
        "True",
    ]
    ours = python(
        "-c", "import sitecustomize; print(sitecustomize.__file__)", path=[launch.BOOTSTRAP, ROOT]
    )
    assert ours == [os.path.join(launch.BOOTSTRAP, "sitecustomize.py")]


def test_an_error_of_the_users_sitecustomize_is_reported_as_ever(tmp_path):
    """Python's own line, once, and the process is patched all the same."""
    broken = write(tmp_path / "broken", "raise ValueError('planted')\n")
    lines = []
    for path in ([broken, ROOT], [launch.BOOTSTRAP, broken, ROOT]):
        env = clean(PYTHONPATH=os.pathsep.join(map(str, path)), FLASHBIAS_PATCH="1")
        done = subprocess.run(
            [sys.executable, "-c", INSTALLED], env=env, text=True, capture_output=True
        )
        assert done.stdout.split() == ["installed", "True"]
        lines.append(done.stderr)
    assert lines[0] == lines[1] and "planted" in lines[0]


def test_a_folder_of_that_name_is_no_sitecustomize(theirs, tmp_path):
    (tmp_path / "odd" / "sitecustomize").mkdir(parents=True)
    out = python(
        "-c",
        INSTALLED,
        path=[launch.BOOTSTRAP, tmp_path / "odd", theirs, ROOT],
        FLASHBIAS_PATCH="1",
    )
    assert out == ["theirs", "installed", "True"]


# -- an interpreter without the package ------------------------------------------------------------


def test_an_interpreter_without_the_package_keeps_its_own_sitecustomize(theirs, tmp_path):
    """`sys.path` without it stands for another Python; nothing is said until torch is imported."""
    bare = write(tmp_path / "bare", "")
    shutil.copy(Path(launch.BOOTSTRAP, "sitecustomize.py"), bare)
    (bare / "flashbias_patch.py").write_text("raise ImportError('not here')")
    assert python("-c", "print(1)", path=[bare, theirs], FLASHBIAS_PATCH="1") == ["theirs", "1"]
    (bare / "torch.py").write_text("")
    out = " ".join(
        python("-c", "import torch; import torch", path=[bare, theirs], FLASHBIAS_PATCH="1")
    )
    assert out.count("this process runs unpatched") == 1 and "not here" in out
    assert python("-c", "import torch", path=[bare, theirs], FLASHBIAS_PATCH="0") == ["theirs"]


def test_python_2_keeps_its_own_sitecustomize(theirs, copy):
    """The file has no newer syntax, and its way without importlib's machinery runs the next one
    once."""
    source = Path(launch.BOOTSTRAP, "sitecustomize.py").read_text()
    newer = (
        ast.JoinedStr,
        ast.AnnAssign,
        ast.NamedExpr,
        ast.AsyncFunctionDef,
        ast.Nonlocal,
        ast.YieldFrom,
    )
    assert not any(
        isinstance(node, newer)
        or getattr(node, "returns", None)
        or getattr(node, "annotation", None)
        for node in ast.walk(ast.parse(source))
    )
    python2 = shutil.which("python2") or shutil.which("python2.7")
    if (
        python2 is not None
        and subprocess.run([python2, "-c", ""], capture_output=True).returncode == 0
    ):
        env = clean(
            PYTHONPATH=os.pathsep.join([launch.BOOTSTRAP, str(copy), str(theirs), str(ROOT)]),
            FLASHBIAS_PATCH="1",
        )
        done = subprocess.run([python2, "-c", "print(1)"], env=env, text=True, capture_output=True)
        assert (done.stdout.split(), done.stderr) == (["theirs", "1"], "")


# -- PYTHONPATH ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, kept",
    [
        (None, []),
        ("", []),
        (os.pathsep + "/a", ["", "/a"]),
        ("/a" + os.pathsep, ["/a", ""]),
        (os.pathsep, ["", ""]),
        ("/a" + os.pathsep * 2 + "/b", ["/a", "", "/b"]),
        ("/a", ["/a"]),
    ],
)
def test_entries_of_pythonpath_survive(given, kept):
    env = {} if given is None else {"PYTHONPATH": given}
    once = launch.prepare_environment(env, patch=True)
    assert once["PYTHONPATH"].split(os.pathsep) == [launch.BOOTSTRAP, *kept, str(ROOT)]
    nested = launch.prepare_environment(once, patch=True)
    assert nested["PYTHONPATH"] == once["PYTHONPATH"]


@pytest.mark.parametrize("given", [os.pathsep + "/nowhere", "/nowhere" + os.pathsep])
def test_an_empty_entry_is_the_working_directory(tmp_path, given):
    (tmp_path / "tools").mkdir()
    (tmp_path / "projects.py").write_text("")
    (tmp_path / "tools" / "train.py").write_text("import projects; print('ok')")
    env = launch.prepare_environment(clean(PYTHONPATH=given), patch=True)
    done = subprocess.run(
        [sys.executable, "tools/train.py"], cwd=tmp_path, env=env, text=True, capture_output=True
    )
    assert done.stdout == "ok\n", done.stderr


# -- ways to start Python --------------------------------------------------------------------------

WORKERS = """
import multiprocessing, sys
def work(queue):
    import flashbias_patch
    queue.put(flashbias_patch.status()["installed"])
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,)); process.start()
    print("installed", queue.get(timeout=100)); process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_are_patched(tmp_path, theirs, method):
    (tmp_path / "work.py").write_text(WORKERS)
    out = python(
        str(tmp_path / "work.py"),
        method,
        path=[launch.BOOTSTRAP, theirs, ROOT],
        FLASHBIAS_PATCH="1",
    )
    assert out[-2:] == ["installed", "True"]


@pytest.mark.parametrize("way", ["module", "safe path", "zip application", "startup file"])
def test_other_ways_to_start_are_patched(tmp_path, theirs, way):
    env, words = {"FLASHBIAS_PATCH": "1"}, ["-m", "started"]
    (tmp_path / "started.py").write_text(INSTALLED)
    path = [launch.BOOTSTRAP, theirs, ROOT, tmp_path]
    if way == "safe path":
        env["PYTHONSAFEPATH"] = "1"
    elif way == "startup file":
        env["PYTHONSTARTUP"] = str(tmp_path / "started.py")  # read by interactive interpreters only
    elif way == "zip application":
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "__main__.py").write_text(INSTALLED)
        words = [shutil.make_archive(str(tmp_path / "app"), "zip", tmp_path / "app")]
    assert python(*words, path=path, **env) == ["theirs", "installed", "True"]


def test_the_first_of_two_installs_is_used(tmp_path, theirs):
    shutil.copytree(
        ROOT / "flashbias_patch",
        tmp_path / "other" / "flashbias_patch",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    out = python(
        "-c",
        "import flashbias_patch; print(flashbias_patch.__file__)",
        path=[launch.BOOTSTRAP, tmp_path / "other", theirs, ROOT],
        FLASHBIAS_PATCH="1",
    )
    assert out == ["theirs", str(tmp_path / "other" / "flashbias_patch" / "__init__.py")]
