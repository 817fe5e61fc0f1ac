"""Implement `flashbias run [--] CMD...`: run a command with all its Python processes patched."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import sys
from typing import List, Optional

from .. import launch, settings

NAME = "run"
HELP = (
    "run a command patched: bash scripts, python, python -m torch.distributed.run, spawned workers"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--off", action="store_true", help="run the command unpatched, otherwise the same"
    )
    parser.add_argument(
        "cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after an optional --"
    )


def command_of(args: argparse.Namespace) -> List[str]:
    """Return the arguments of the command without the separating --."""
    command: List[str] = args.cmd
    return command[1:] if command[:1] == ["--"] else command


def main(args: argparse.Namespace) -> int:
    """Replace this process by the command; return an exit status only if that fails."""
    command = command_of(args)
    if not command:
        print(
            "flashbias run: CMD is missing: say what to run, e.g. flashbias run -- bash "
            "tools/dist_train.sh CONFIG 8",
            file=sys.stderr,
        )
        return 2
    program = shutil.which(command[0])
    if program is None:
        print(f"flashbias run: CMD: {command[0]!r} is not a program on PATH", file=sys.stderr)
        return 127
    enabled = settings.current().patch
    if not enabled and not args.off:
        print("flashbias run: FLASHBIAS_PATCH is off: the command runs unpatched", file=sys.stderr)
    option = ignores_path(command) if enabled and not args.off else None
    if option:
        print(
            f"flashbias run: Python's option {option} ignores PYTHONPATH or sitecustomize: the "
            "command runs unpatched",
            file=sys.stderr,
        )
    summary = {} if os.environ.get("FLASHBIAS_SUMMARY", "").strip() else {"FLASHBIAS_SUMMARY": "1"}
    env = launch.prepare_environment(os.environ, patch=enabled and not args.off, extra=summary)
    sys.stdout.flush()
    try:
        os.execve(program, command, env)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            print(
                f"flashbias run: CMD: {program!r} cannot be executed: {error.strerror}",
                file=sys.stderr,
            )
            return 126
    os.execve(
        "/bin/sh", ["sh", program, *command[1:]], env
    )  # a script without a #! line, run as shells do
    raise AssertionError("unreachable")


def ignores_path(command: List[str]) -> Optional[str]:
    """Return the option that makes a Python command ignore PYTHONPATH or sitecustomize, or None."""
    if not re.fullmatch(r"python[\d.]*", os.path.basename(command[0])):
        return None
    for argument in command[1:]:
        if not re.fullmatch(r"-[A-Za-z]+", argument):
            # the script, or the separate value of -X or -W, which ends the search too
            return None
        options = re.split("[cmWX]", argument[1:])[0]
        letter_that_ignores = next((letter for letter in options if letter in "IES"), None)
        if letter_that_ignores:
            return f"-{letter_that_ignores}"
    return None
