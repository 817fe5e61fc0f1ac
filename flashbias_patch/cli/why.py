"""Implement `flashbias why NAME -- CMD...`: find out why a parameter does not learn."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

from .. import launch, settings
from .argument_types import seconds
from .run import command_of

NAME = "why"
HELP = (
    "run a few steps of a training command and report why a parameter does not learn: the first "
    "broken link and what to change"
)
STEPS, TIMEOUT = 5, 1800.0
GRACE = 30.0  # seconds that a command may take to end after its steps
DONE = "stopped"  # a process writes this file when it ends after its steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_options(parser)
    parser.add_argument(
        "name", metavar="NAME", help="the parameter, e.g. bias_scale; patterns as in fnmatch"
    )
    parser.add_argument(
        "cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command that trains, after --"
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=_count,
        default=STEPS,
        help=f"optimizer steps to watch (default {STEPS}, at least 2)",
    )
    parser.add_argument("--off", action="store_true", help="run the command unpatched")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"end the command after this time (default {TIMEOUT:g})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--markdown", action="store_true", help="print Markdown instead of text, for an issue"
    )


def _options_after_name(args: argparse.Namespace) -> None:
    """Parse options between NAME and --, which argparse counts as part of the command."""
    if args.cmd[:1] == ["--"] or "--" not in args.cmd or not args.cmd[0].startswith("-"):
        return
    end = args.cmd.index("--")
    parser = argparse.ArgumentParser(
        prog="flashbias why NAME", add_help=False, argument_default=argparse.SUPPRESS
    )
    _add_options(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.parse_args(args.cmd[:end], args)
    args.cmd = args.cmd[end:]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of at least 2, got {text!r}")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Run the command and print the diagnoses.

    Exit status: 0 if no link is broken, 1 if one is, 2 for wrong arguments, 3 if nothing could be
    observed.
    """
    _options_after_name(args)
    command = command_of(args)
    if not command:
        print(
            "flashbias why: CMD is missing: say what trains, e.g. "
            f"flashbias why {args.name} -- python tools/train.py CONFIG",
            file=sys.stderr,
        )
        return 2
    if shutil.which(command[0]) is None:
        print(f"flashbias why: CMD: {command[0]!r} is not a program on PATH", file=sys.stderr)
        return 127
    if args.json and args.markdown:
        print("flashbias why: --json: not with --markdown; give one of them", file=sys.stderr)
        return 2
    patch = settings.current().patch and not args.off
    with tempfile.TemporaryDirectory(prefix="flashbias-why-") as directory:
        status, output = run_watched(command, directory, args.name, args.steps, patch, args.timeout)
        facts = read_facts(directory)
    if facts is None or (status and not facts["roots"]):
        print(
            "flashbias why: no process of the command called a module and ended normally "
            f"(exit status {status}); the end of its output:\n{output}",
            file=sys.stderr,
        )
        return 3
    report = make_report(args.name, facts, patch, status)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        from ..why import render

        print(render.markdown(report) if args.markdown else render.text(report))
    return 1 if any(diagnosis["broken"] for diagnosis in report["diagnoses"]) else 0


def run_watched(
    command: List[str], directory: str, name: str, steps: int, patch: bool, timeout: float
) -> Tuple[Optional[int], str]:
    """Run the command under why/observer.py; return its exit status and the end of its output."""
    extra = {
        "FLASHBIAS_PROBE": directory,
        launch.WHY: name,
        "FLASHBIAS_PROBE_STEPS": str(steps),
        "TORCHDYNAMO_DISABLE": "1",
    }
    env = launch.prepare_environment(os.environ, patch=patch, extra=extra)
    log = os.path.join(directory, "output.log")
    with open(log, "wb") as file:
        status = _wait(command, directory, env, file, timeout)
    with open(log, errors="replace") as text:
        return status, "".join(text.readlines()[-15:])


def _wait(
    command: List[str], directory: str, env: Dict[str, str], log: Any, timeout: float
) -> Optional[int]:
    """Wait for the command, at most `timeout` seconds; return its exit status.

    If a process has written its facts, the command has GRACE seconds to end.
    """
    from ..ab import processes

    begin, written = time.monotonic(), None
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        preexec_fn=processes.end_with_parent(),
    )
    try:
        while child.poll() is None:
            time.sleep(processes.POLL)
            now = time.monotonic()
            if written is None and os.path.exists(os.path.join(directory, DONE)):
                written = now
            if now - begin > timeout or (written is not None and now - written > GRACE):
                break
    finally:
        with processes.deaf_to_interrupts():
            processes.end(child, directory)
    return child.returncode


def read_facts(directory: str) -> Optional[Dict[str, Any]]:
    """Return the facts of the process that trained: most steps and backward passes, lowest rank."""
    candidates: List[Tuple[Any, Dict[str, Any]]] = []
    for name in sorted(os.listdir(directory)):
        if name.startswith("rank") and name.endswith(".json"):
            with open(os.path.join(directory, name)) as file:
                facts = json.load(file)
            if facts["torch"]:
                rank = int(name[4:].split("-")[0])
                candidates.append(
                    ((-facts["steps"], -facts["backwards"], -len(facts["roots"]), rank), facts)
                )
    return min(candidates, key=lambda entry: entry[0])[1] if candidates else None


def make_report(
    name: str, facts: Dict[str, Any], patch: bool, status: Optional[int]
) -> Dict[str, Any]:
    """Return the report as a JSON-able dict."""
    from ..why import diagnosis

    notes = [f"incomplete observation: {error}" for error in facts["errors"][:3]]
    if status:
        notes.append(f"the command ended with status {status}")
    if facts["skipped"]:
        notes.append(f"GradScaler skipped {facts['skipped']} steps")
    return {
        "name": name,
        "steps": facts["steps"],
        "patched": patch,
        "classes": facts["patched"],
        "torch": facts["torch"],
        "calls": facts["calls"],
        "diagnoses": diagnosis.diagnose(facts),
        "notes": notes,
    }
