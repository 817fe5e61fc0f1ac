"""Triton's key of its installation on disk: used by the next process while no file changed, and
computed by Triton in every other case."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from types import SimpleNamespace

import pytest

from flashbias_patch import settings
from tests.support import internals

triton = pytest.importorskip("triton")
pytest.importorskip("triton.runtime.jit")

from flashbias_patch.attention.kernels import cached_launch, kept_key  # noqa: E402

# Reads its library as Triton's own does.
FUNCTION = """
@functools.lru_cache()
def triton_key():
    with open(os.path.join(os.path.dirname(__file__), "_C", "libtriton."), "rb") as f:
        return "-".join([hashlib.sha256(f.read()).hexdigest()])
"""


class Installation:
    """A small Triton, and the processes that use it. `computed`: files that were hashed."""

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch, self.computed = root, monkeypatch, []
        (root / "_C").mkdir(parents=True)
        (root / "compiler" / "__pycache__").mkdir(parents=True)
        (root / "_C" / "libtriton.").write_bytes(b"code")
        (root / "_C" / "libtriton.so").write_bytes(b"code")
        (root / "compiler" / "compiler.py").write_text("x = 1\n")
        (root / "__init__.py").write_text("")
        monkeypatch.setattr(triton, "__file__", str(root / "__init__.py"))
        self.during = lambda: None

    def _open(self, name, mode):
        self.computed.append(name)
        self.during()
        return open(name, mode)

    def process(self, source=FUNCTION):
        """The module of a new process's Triton."""
        module = {"functools": functools, "os": os, "hashlib": hashlib, "open": self._open}
        module["__file__"] = str(self.root / "__init__.py")
        exec(source, module)
        found = SimpleNamespace(triton_key=module["triton_key"])
        self.monkeypatch.setattr(kept_key, "_modules", lambda: [found])
        internals.forget_tritons_key(self.monkeypatch)
        return found

    def key(self):
        """The key in a new process."""
        module = self.process()
        kept_key.prepare()
        return module.triton_key()


@pytest.fixture
def installation(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASHBIAS_VERDICTS", "on")
    settings.reload()
    return Installation(tmp_path / "triton", monkeypatch)


def test_the_next_process_does_not_compute_it(installation):
    keys = [installation.key() for _ in range(3)]
    assert len(set(keys)) == 1 and len(installation.computed) == 1


def test_every_module_that_looks_it_up_gets_it(installation, monkeypatch):
    installation.key()
    module = installation.process()
    other = SimpleNamespace(triton_key=module.triton_key)
    unlike = SimpleNamespace(triton_key=lambda: "mine")
    monkeypatch.setattr(kept_key, "_modules", lambda: [module, other, unlike])
    kept_key.prepare()
    assert other.triton_key is module.triton_key and unlike.triton_key() == "mine"


def test_a_triton_without_such_a_function_is_left_alone(installation, monkeypatch):
    installation.process()
    monkeypatch.setattr(kept_key, "_modules", list)
    kept_key.prepare()
    assert not os.path.exists(kept_key.path())


def test_a_process_looks_once(installation, monkeypatch):
    installation.key()
    monkeypatch.setattr(kept_key, "rows", lambda: pytest.fail("read again"))
    kept_key.prepare()


def rewrite(root):
    """Same size, and the time of modification is put back."""
    library = root / "_C" / "libtriton.so"
    before = library.stat()
    time.sleep(0.02)  # the clock of file systems has steps of a few milliseconds
    library.write_bytes(b"edoc")
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "longer": lambda root: (root / "_C" / "libtriton.so").write_bytes(b"longer"),
    "rewritten": rewrite,
    "touched": lambda root: os.utime(root / "compiler" / "compiler.py", (1, 1)),
    "added": lambda root: (root / "compiler" / "more.py").write_text(""),
    "removed": lambda root: (root / "compiler" / "compiler.py").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_it_is_computed_again(installation, change):
    installation.key()
    CHANGES[change](installation.root)
    installation.key()
    assert len(installation.computed) == 2
    installation.key()
    assert len(installation.computed) == 2


def test_what_python_writes_itself_changes_nothing(installation):
    installation.key()
    (installation.root / "compiler" / "__pycache__" / "compiler.cpython-311.pyc").write_text("")
    installation.key()
    assert len(installation.computed) == 1


def test_a_change_while_it_is_computed_is_noticed(installation):
    installation.during = lambda: CHANGES["longer"](installation.root)
    installation.key()
    installation.during = lambda: None
    installation.key()
    assert len(installation.computed) == 2


def test_a_linked_directory_is_not_followed(installation, tmp_path):
    """Triton's development trees link their backends; a link may lead back."""
    (installation.root / "backends").symlink_to(installation.root, target_is_directory=True)
    for _ in range(2):
        installation.key()
    assert len(installation.computed) == 2 and not os.path.exists(kept_key.path())


UNLIKE = {
    "reads the environment": FUNCTION.replace('"rb"', 'os.environ.get("X", "rb")'),
    "reads elsewhere": FUNCTION.replace('"_C"', '"..", "triton", "_C"'),
    "without a cache": FUNCTION.replace("@functools.lru_cache()", ""),
    "a replacement": "triton_key = lambda: 'mine'",
    "none": "triton_key = None",
}


@pytest.mark.parametrize("source", UNLIKE.values(), ids=UNLIKE)
def test_another_function_is_left_alone(installation, source):
    module = installation.process(source)
    function = module.triton_key
    kept_key.prepare()
    assert module.triton_key is function and installation.computed == []
    assert not os.path.exists(kept_key.path())


def test_a_key_that_is_known_already_is_left_alone(installation):
    installation.key()
    module = installation.process()
    function = module.triton_key
    function()
    kept_key.prepare()
    assert module.triton_key is function and len(installation.computed) == 2


def test_switched_off_it_neither_reads_nor_writes(installation):
    installation.key()
    settings.reload({"FLASHBIAS_VERDICTS": "off"})
    module = installation.process()
    function = module.triton_key
    kept_key.prepare()
    assert module.triton_key is function and len(installation.computed) == 1
    os.unlink(kept_key.path())
    installation.process()
    kept_key.prepare()
    assert not os.path.exists(kept_key.path())


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '[{"files": 1}]', "\x00\xff" * 9, "[" * 10**5])
def test_a_damaged_file_counts_as_empty(installation, text):
    key = installation.key()
    with open(kept_key.path(), "w", encoding="latin-1") as file:
        file.write(text)
    assert [installation.key(), installation.key()] == [key, key]
    assert len(installation.computed) == 2


def test_an_empty_key_is_no_key(installation):
    key = installation.key()
    with open(kept_key.path()) as file:
        written = file.read()
    with open(kept_key.path(), "w") as file:
        file.write(written.replace(key, ""))
    assert [installation.key(), installation.key()] == [key, key]
    assert len(installation.computed) == 2


def test_a_file_of_another_user_counts_as_empty(installation, monkeypatch):
    installation.key()
    owned = os.stat_result((0, 0, 0, 0, 12345, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda handle: owned)
    assert kept_key.rows() == []


def test_a_directory_that_cannot_be_written_costs_a_computation_only(
    installation, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert installation.key() == installation.key()


def test_threads_that_need_it_wait(installation):
    module = installation.process()
    installation.during = lambda: time.sleep(0.05)
    keys = []

    def launch():
        kept_key.prepare()
        keys.append(module.triton_key())

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4 and len(installation.computed) == 1


def test_the_installed_triton_is_known_and_gets_its_own_key(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FLASHBIAS_VERDICTS", "on")
    settings.reload()
    real = kept_key._modules()[0]
    function = real.triton_key
    keys = []
    for _ in range(2):
        fresh = functools.lru_cache()(function.__wrapped__)
        monkeypatch.setattr(real, "triton_key", fresh)
        internals.forget_tritons_key(monkeypatch)
        kept_key.prepare()
        keys.append(real.triton_key())
    assert keys[0] == keys[1] and real.triton_key is not fresh and fresh.cache_info().misses == 0


class Kernel(cached_launch.JITFunction):
    """A kernel that is not compiled."""

    def __init__(self, done):
        self.done = done

    def __getitem__(self, grid):
        return lambda *given, **options: self.done.append("launch")

    def warmup(self, *given, **options):
        self.done.append("compile")


def test_it_is_there_before_a_kernel_is_compiled_or_launched(monkeypatch):
    done = []
    monkeypatch.setattr(kept_key, "prepare", lambda: done.append("key"))
    launch = cached_launch.Launch(Kernel(done), 1, (), {})
    launch.first(())
    monkeypatch.setattr(cached_launch, "collecting", SimpleNamespace(get=lambda: True))
    launch.first(())
    assert done == ["key", "launch", "key", "compile"]


def test_the_interpreter_needs_none(monkeypatch):
    monkeypatch.setattr(kept_key, "prepare", lambda: pytest.fail("prepared"))
    interpreted = SimpleNamespace()
    kernel = {(1, 1, 1): lambda *given, **options: interpreted}
    cached_launch.Launch(kernel, 1, (), {}).first(())
