"""`flashbias why` names the cause of each small program, seen in a process of its own kind: the
observer, the diagnosis."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flashbias_patch import launch
from flashbias_patch.why import diagnosis

from .programs import MODEL, PROGRAMS

RUNNER = """
import json, os, sys, traceback
programs, out = json.load(open(sys.argv[1])), sys.argv[2]
import torch, torch._dynamo, torch.utils.checkpoint
import flashbias_patch.why.graph, flashbias_patch.why.subjects, flashbias_patch.why.surroundings, flashbias_patch.ab.capture
for name, source in programs.items():
    if os.fork() == 0:
        try:
            from flashbias_patch.why import observer
            os.environ["FLASHBIAS_PROBE"] = os.path.join(out, name)
            observer._observer = None
            observer.start()
            code = compile(source, name, "exec")
            exec(code, {"__name__": "__main__"})
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        observer._observer.finish()
        os._exit(0)
    os.wait()
"""  # noqa: E501


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """The facts of every program; each runs in a fork of one process that has imported torch."""
    folder = tmp_path_factory.mktemp("why")
    sources = folder / "programs.json"
    sources.write_text(
        json.dumps({name: MODEL + program for name, (program, _, _) in PROGRAMS.items()})
    )
    (folder / "runner.py").write_text(RUNNER)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FLASHBIAS_PATCH": "0",
        launch.WHY: "bias_scale",
    }
    done = subprocess.run(
        [sys.executable, str(folder / "runner.py"), str(sources), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in PROGRAMS:
        files = list((folder / name).glob("rank*.json"))
        assert files, (name, done.stderr[-3000:])
        found[name] = json.loads(files[0].read_text())
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_cause_is_named(facts, name):
    _, cause, words = PROGRAMS[name]
    assert not facts[name]["errors"]
    (found,) = diagnosis.diagnose(facts[name])
    assert (found["broken"] or {}).get("cause") == cause, json.dumps(found["links"], indent=1)
    said = found["verdict"] + (found["broken"]["change"] if found["broken"] else "")
    assert words in said, said
