"""The benchmark of the shim's own Python runs against this version of its parts."""

import json
import subprocess
import sys

from tests.support.scripts import ROOT


def test_calls_are_timed_patched_and_unpatched():
    code = "import json, overhead; print(json.dumps(overhead.call_times(1, 2)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT / "benchmarks",
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"unpatched_us", "patched_us", "ratio", "shim_us"}
    assert found["unpatched_us"] > 0 and found["patched_us"] > 0
