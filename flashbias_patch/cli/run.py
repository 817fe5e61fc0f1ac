"""`flashbias run [--] CMD...`: run a command with every Python process of it patched."""
from __future__ import annotations

import argparse
import os
import shutil
import sys

from .. import launch

NAME = "run"
HELP = "run a command patched: bash scripts, python, python -m torch.distributed.run, spawned workers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--off", action="store_true", help="run the command unpatched, all else the same")
    parser.add_argument("cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after an optional --")


def command_of(args: argparse.Namespace) -> list[str]:
    """The command's words, without the separating --."""
    return args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd


def main(args: argparse.Namespace) -> int:
    command = command_of(args)
    if not command:
        print("flashbias run: CMD is missing: say what to run, e.g. flashbias run -- bash tools/dist_train.sh CONFIG 8",
              file=sys.stderr)
        return 2
    program = shutil.which(command[0])
    if program is None:
        print(f"flashbias run: CMD: {command[0]!r} is not a program on PATH", file=sys.stderr)
        return 127
    env = launch.prepare_environment(os.environ, patch=not args.off)
    sys.stdout.flush()
    os.execve(program, command, env)
    raise AssertionError("unreachable")
