"""Patch every Python process that starts with FLASHBIAS_PATCH=1, and cost nothing otherwise.

Python imports the first sitecustomize on its path; this one goes on to the next, if there is one.
"""
import os

if os.environ.get("FLASHBIAS_PATCH", "").lower() in ("1", "true", "on", "yes"):
    from flashbias_patch import launch

    launch.start_process(__file__)
else:
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _own = os.path.dirname(os.path.abspath(__file__))
    _next = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != _own])
    if _next is not None and _next.loader is not None:
        _next.loader.exec_module(module_from_spec(_next))
