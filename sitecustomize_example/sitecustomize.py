"""Go on to the next sitecustomize of the path, then patch this process if FLASHBIAS_PATCH says so.

Python imports only the first sitecustomize on its path. `flashbias run` and `flashbias ab` put a directory with this
file in front of PYTHONPATH; sitecustomize_example holds the same file. It needs nothing but the standard library, since
other interpreters of a command, which have no flashbias_patch, import it too.
"""
import os
import sys


def _next(own):
    """The spec of the sitecustomize that comes after the file `own`; one that is being executed already is left out."""
    from importlib.machinery import PathFinder

    folder = os.path.dirname(own)
    entries = [os.path.abspath(entry or os.curdir) for entry in sys.path]
    rest = sys.path[entries.index(folder) + 1:] if folder in entries else list(sys.path)
    running, frame = set(), sys._getframe()
    while frame is not None:
        running.add(os.path.realpath(frame.f_code.co_filename))
        frame = frame.f_back
    for i in range(len(rest)):
        spec = PathFinder.find_spec("sitecustomize", rest[i:i + 1])
        if spec is not None and spec.loader is not None and os.path.realpath(spec.origin or "") not in running:
            return spec
    return None


def _chain(own):
    """Execute that file as the module `sitecustomize`. Its exception reaches Python as if this file were not there."""
    spec = _next(own)
    if spec is None:
        return
    from importlib.util import module_from_spec

    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module  # `import sitecustomize` finds that one
    spec.loader.exec_module(module)


class _Missing:
    """A finder that finds nothing: it says that flashbias_patch is missing when torch is first imported."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "torch" and self in sys.meta_path:
            sys.meta_path.remove(self)
            error = f"{type(self.error).__name__}: {self.error}"
            sys.stderr.write(f"flashbias_patch does not import in {sys.executable} ({error}): this process runs unpatched\n")


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
