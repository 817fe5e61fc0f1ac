"""`flashbias run [--] CMD...`: run a command with every Python process of it patched."""

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
        "--off", action="store_true", help="run the command unpatched, all else the same"
    )
    parser.add_argument(
        "cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after an optional --"
    )


def command_of(args: argparse.Namespace) -> List[str]:
    """The command's words, without the separating --."""
    return args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd


def main(args: argparse.Namespace) -> int:
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
    wanted = settings.current().patch
    if not wanted and not args.off:
        print("flashbias run: FLASHBIAS_PATCH is off: the command runs unpatched", file=sys.stderr)
    option = ignores_path(command) if wanted and not args.off else None
    if option:
        print(
            f"flashbias run: Python's option {option} leaves out PYTHONPATH or sitecustomize: it "
            "runs unpatched",
            file=sys.stderr,
        )
    summary = {} if os.environ.get("FLASHBIAS_SUMMARY", "").strip() else {"FLASHBIAS_SUMMARY": "1"}
    env = launch.prepare_environment(os.environ, patch=wanted and not args.off, extra=summary)
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
    )  # a script without a first line, as shells run it
    raise AssertionError("unreachable")


def ignores_path(command: List[str]) -> Optional[str]:
    """The option by which a Python on the command line does not see what PYTHONPATH holds; None if
    there is none."""
    if not re.fullmatch(r"python[\d.]*", os.path.basename(command[0])):
        return None
    for word in command[1:]:
        if not re.fullmatch(r"-[A-Za-z]+", word):
            # the script; -X and -W take their value along, or as the next word, which stops the
            # search
            return None
        options = re.split("[cmWX]", word[1:])[0]
        found = next((letter for letter in options if letter in "IES"), None)
        if found:
            return f"-{found}"
    return None
