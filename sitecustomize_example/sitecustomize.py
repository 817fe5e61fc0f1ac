"""Run the next sitecustomize on the path, then patch this process if FLASHBIAS_PATCH is on.

Python imports only the first sitecustomize on its path. `flashbias run` and `flashbias ab` put a
directory with this file in front of PYTHONPATH; sitecustomize_example holds the same file. It uses
only the standard library, because other interpreters that the command starts import it too. They
may lack flashbias_patch, and they may be Python 2.
"""

import os
import sys


def _later(own):
    """Return the entries of sys.path after the directory of the file `own`, and the files that are
    being executed."""
    folder = os.path.dirname(own)
    entries = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    rest = sys.path[entries.index(folder) + 1 :] if folder in entries else list(sys.path)
    running, frame = set(), sys._getframe()
    while frame is not None:
        running.add(os.path.realpath(frame.f_code.co_filename))
        frame = frame.f_back
    return rest, running


def _chain(own):
    """Execute the next file as the module `sitecustomize`. Its exceptions reach Python
    unchanged."""
    rest, running = _later(own)
    try:
        from importlib.machinery import PathFinder
        from importlib.util import module_from_spec
    except ImportError:
        return _chain_python2(rest, running)
    for i in range(len(rest)):
        spec = PathFinder.find_spec("sitecustomize", rest[i : i + 1])
        if (
            spec is not None
            and spec.loader is not None
            and os.path.realpath(spec.origin or "") not in running
        ):
            module = module_from_spec(spec)
            sys.modules["sitecustomize"] = module  # so that `import sitecustomize` returns it
            return spec.loader.exec_module(module)


def _chain_python2(rest, running):
    import imp

    for entry in rest:
        path = os.path.join(entry, "sitecustomize.py")
        if os.path.isfile(path) and os.path.realpath(path) not in running:
            return imp.load_source("sitecustomize", path)


class _Missing:
    """A finder that finds no module; it reports a missing flashbias_patch at the import of
    torch."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "torch" and self in sys.meta_path:
            sys.meta_path.remove(self)
            error = type(self.error).__name__ + ": " + str(self.error)
            sys.stderr.write(
                "flashbias_patch does not import in "
                + sys.executable
                + " ("
                + error
                + "): this process runs unpatched\n"
            )

    def find_module(self, name, path=None):  # Python 2
        return self.find_spec(name)


def _start():
    value = os.environ.get("FLASHBIAS_PATCH", "").strip().lower()
    off = value in ("", "0", "false", "off", "no", "n", "none", "disable", "disabled")
    if off and not os.environ.get("FLASHBIAS_PROBE"):
        return
    try:
        from flashbias_patch import launch
    except Exception as error:
        if not off:
            sys.meta_path.insert(0, _Missing(error))
        return
    launch.start_process()


try:
    _chain(os.path.abspath(__file__))
finally:
    _start()
