"""`flashbias`: one subcommand a module, each with NAME, HELP, add_arguments(parser) and main(args) -> exit status."""
from __future__ import annotations

import argparse
import importlib
import sys
from typing import List, Optional

COMMANDS = ("run", "doctor", "ab", "bench", "tune", "report")


def main(argv: Optional[List[str]] = None) -> int:
    """Entry point of the console script. Returns the exit status; 2 for a mistake in the command or environment."""
    from .. import __version__, settings

    parser = argparse.ArgumentParser(
        prog="flashbias", description="Run, check and compare training commands patched by flashbias_patch."
    )
    parser.add_argument("--version", action="version", version=f"flashbias_patch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        modules[name] = module
        sub = commands.add_parser(
            module.NAME, help=module.HELP, description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    args = parser.parse_args(argv)
    problems = settings.current().problems
    if problems:
        for problem in problems:
            print("flashbias:", problem.partition(" Using the default")[0], file=sys.stderr)
        return 2
    return modules[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
