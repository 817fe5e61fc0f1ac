"""Run the `flashbias` command: one module per subcommand.

Each module has NAME, HELP, add_arguments(parser) and main(args) -> exit status. Importing this
module is cheap: the rest is imported inside `guarded`, which also handles errors of these imports.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Optional

COMMANDS = ("run", "doctor", "why", "ab", "bench", "tune", "report")
BROKEN_PIPE = 141  # the exit status that shells report after SIGPIPE
INTERRUPTED = 130


def main(argv: Optional[List[str]] = None) -> int:
    """Run the console script and return its exit status; 2 for a wrong command or environment."""
    arguments = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the file descriptor is closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    return guarded(
        next((first for first in arguments[:1] if first in COMMANDS), ""), lambda: _main(argv)
    )


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
    return 2 if environment_is_wrong() else modules[args.command].main(args)


def environment_is_wrong() -> bool:
    """Print the problems with FLASHBIAS_* variables; return True if a value is wrong.

    In that case no command may start.
    """
    from .. import environment, settings

    read = settings.current()
    mistakes = read.problems + environment.problems()
    for problem in settings.unnamed(
        mistakes + read.unknown
    ):  # importing this package reported some of them already
        print("flashbias:", problem, file=sys.stderr)
    if mistakes:
        print("flashbias: nothing was run; correct the variables named above", file=sys.stderr)
    return bool(mistakes)


def guarded(command: str, run: Callable[[], int]) -> int:
    """Return run(); print one line instead of a traceback for errors that are not bugs of this
    package."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the pipe has ended, as in `flashbias doctor | head`
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
    """Discard unwritten output if stdout is broken, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
