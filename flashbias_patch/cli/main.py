"""`flashbias`: one subcommand per module, each with NAME, HELP, add_arguments(parser) and
main(args) -> exit status.

Importing this module imports next to nothing: whatever takes time is imported under the guard.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Optional

COMMANDS = ("run", "doctor", "why", "ab", "bench", "tune", "report")
BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
INTERRUPTED = 130


def main(argv: Optional[List[str]] = None) -> int:
    """Entry point of the console script. Returns the exit status; 2 for a mistake in the command or
    environment."""
    words = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # its descriptor is closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    return guarded(next((word for word in words[:1] if word in COMMANDS), ""), lambda: _main(argv))


def _main(argv: Optional[List[str]]) -> int:
    import argparse
    import importlib

    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="flashbias",
        description="Run, check and compare training commands patched by flashbias_patch.",
    )
    parser.add_argument("--version", action="version", version=f"flashbias_patch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        modules[name] = module
        sub = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    args = parser.parse_args(argv)
    return 2 if mistaken_environment() else modules[args.command].main(args)


def mistaken_environment() -> bool:
    """Name what is wrong with the FLASHBIAS_* variables; True if a value is, so that nothing may
    start."""
    from .. import environment, settings

    read = settings.current()
    mistakes = read.problems + environment.problems()
    for problem in settings.unnamed(
        mistakes + read.unknown
    ):  # importing this package named some of them
        print("flashbias:", problem, file=sys.stderr)
    if mistakes:
        print("flashbias: nothing was run; correct the variables named above", file=sys.stderr)
    return bool(mistakes)


def guarded(command: str, run: Callable[[], int]) -> int:
    """run(), where an error that is no mistake of this package ends in one line instead of a
    traceback."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone, as in `flashbias doctor | head`
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        problem, status = "interrupted", INTERRUPTED
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename!r}: "
        problem, status = f"{where}{error.strerror or error}", 2
    except UnicodeError as error:
        problem, status = f"text that cannot be decoded or printed: {error}", 2
    except RecursionError:
        problem, status = "the input is nested too deeply, or contains itself", 2
    except ValueError as error:
        if type(error).__name__ != "JSONDecodeError":
            raise
        problem, status = f"a file is not valid JSON: {error}", 2
    print(f"flashbias {command}".rstrip() + f": {problem}", file=sys.stderr)
    _discard_output()
    return status


def _discard_output() -> None:
    """Give up what cannot be written to standard output, so that Python does not try again at
    exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
