"""Seeded faults: apply one-line faults to a copy of the package and see which tests notice.

    python tools/seeded_faults.py                    # every fault; about a quarter of an hour
    python tools/seeded_faults.py --only kernel      # faults whose name contains a word
    python tools/seeded_faults.py --list             # check that every anchor is found

Each row of FAULTS names a place (a glob under flashbias_patch/), a text that occurs there exactly
once, the faulty text, and the tests that should fail. The working tree is copied first and is never
changed. A fault is "killed" where a test fails, "survived" where all pass, and "not found" where
the code has moved on: then the row needs another anchor.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import List, NamedTuple, NoReturn, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "flashbias_patch"
SECONDS = 240  # limit of one fault's tests; one that does not end in time counts as killed
BIAS, ATTENTION, PATCHING = "tests/bias/test_", "tests/attention/test_", "tests/patching/test_"
RECOVERY, KERNELS = "tests/attention/recovery/test_", "tests/attention/kernels/test_"
BACKENDS, AQR, AB = "tests/attention/backends/test_", "tests/aqr/test_", "tests/ab/test_"


class Fault(NamedTuple):
    """One faulty line: where it is, and what should notice it."""

    name: str
    place: str  # glob of files under the package
    old: str
    new: str
    tests: Tuple[str, ...]  # arguments of pytest


def fault(name: str, place: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, place, old, new, tests)


FAULTS = (
    # -- bias
    fault(
        "bias: a sum subtracts",
        "bias/*.py",
        "total = total + term.dense()",
        "total = total - term.dense()",
        BIAS + "algebra.py",
    ),
    fault(
        "bias: segments of unlike runs",
        "bias/*.py",
        "+ weights2[..., indices2]",
        "+ weights2[..., indices1]",
        BIAS + "algebra.py",
    ),
    fault(
        "bias: -inf times a factor",
        "bias/*.py",
        '* factor).masked_fill(masked, float("-inf"))',
        "* factor)",
        BIAS + "algebra.py",
    ),
    fault(
        "bias: shapes do not broadcast",
        "bias/*.py",
        "sizes.append(other_size if size == 1 else size)",
        "sizes.append(size)",
        BIAS + "algebra.py",
    ),
    fault(
        "bias: masks merge by and",
        "bias/base.py",
        "            mask = mask | term.mask\n",
        "            mask = mask & term.mask\n",
        BIAS + "algebra.py",
    ),
    fault(
        "precision: no low part of k",
        "bias/precision.py",
        "k_columns.append(_low_part(k_factor, k_high))",
        "k_columns.append(torch.zeros_like(k_high))",
        BIAS + "precision.py",
    ),
    fault(
        "precision: unbalanced columns",
        "bias/precision.py",
        "return q_factor * shrink, k_factor * grow",
        "return q_factor, k_factor",
        BIAS + "precision.py",
        ATTENTION + "values.py",
    ),
    fault(
        "windows: even sides reach the other way",
        "bias/*.py",
        "return side // 2 - side + 1, side // 2",
        "return -(side // 2), side - 1 - side // 2",
        BIAS + "windows.py",
    ),
    fault(
        "windows: equal windows drop one weight",
        "bias/windows.py",
        "self._weighted(self.weights + other.weights)",
        "self._weighted(self.weights)",
        BIAS + "windows.py",
    ),
    fault(
        "windows: the profile is wider",
        "bias/*.py",
        "squares / (-2.0 * sigma * sigma)",
        "squares / (-2.1 * sigma * sigma)",
        BIAS + "windows.py",
    ),
    fault(
        "factorize: one rank too few",
        "bias/factorize.py",
        ".sum(-1).max()) + 1",
        ".sum(-1).max())",
        BIAS + "factorize.py",
    ),
    fault(
        "factorize: the error is squared",
        "bias/factorize.py",
        "return math.sqrt(float(share.max()))",
        "return float(share.max())",
        BIAS + "factorize.py",
    ),
    # -- one call: inputs, masks, backends
    fault(
        "inputs: two masks hide what both hide",
        "attention/inputs.py",
        "mask = four if mask is None else mask | four",
        "mask = four if mask is None else mask & four",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "inputs.py",
        ATTENTION + "dispatch.py",
        ATTENTION + "values.py",
        BIAS + "algebra.py",
    ),
    fault(
        "inputs: a float mask replaces the bias",
        "attention/inputs.py",
        "dense = four if dense is None else dense + four",
        "dense = four",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "inputs.py",
        ATTENTION + "values.py",
        PATCHING + "inner_attention.py",
    ),
    fault(
        "inputs: a mask for each sample is refused",
        "attention/inputs.py",
        "mask.dim() == 3 and mask.shape[0] in (1, B):",
        "mask.dim() == 3 and mask.shape[0] in (1,):",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "inputs.py",
    ),
    fault(
        "inputs: an infinite scale",
        "attention/inputs.py",
        "if not math.isfinite(number):",
        "if False:",
        ATTENTION + "inputs.py",
    ),
    fault(
        "inputs: dropout of everything",
        "attention/inputs.py",
        "0.0 <= dropout_p < 1.0",
        "0.0 <= dropout_p <= 1.0",
        ATTENTION + "inputs.py",
    ),
    fault(
        "reference: masked keys stay visible",
        "attention/chunked_attention.py",
        "_part(inputs.mask, rows, keys), -math.inf)",
        "_part(inputs.mask, rows, keys), -10.0)",
        BACKENDS + "sdpa_and_reference.py",
    ),
    fault(
        "reference: dropout without its scale",
        "attention/chunked_attention.py",
        "        out.mul_(dropout.scale)\n",
        "        pass\n",
        ATTENTION + "dispatch.py",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "selfcheck.py",
    ),
    fault(
        "reference: gradients without the sum's inverse",
        "attention/chunked_attention.py",
        "grad * (state.inverse * dropout.scale)",
        "grad * dropout.scale",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "dispatch.py",
    ),
    fault(
        "sdpa: rows without keys are not cleared",
        "attention/backends/sdpa.py",
        "out = out.masked_fill(masked_rows, 0.0)",
        "pass",
        BACKENDS + "sdpa_and_reference.py",
        ATTENTION + "values.py",
    ),
    fault(
        "sdpa: windows replace the dense bias",
        "attention/backends/sdpa.py",
        "dense=bias if inputs.dense is None else bias + inputs.dense",
        "dense=bias",
        BIAS + "windows.py",
    ),
    fault(
        "flash: rows without keys are not cleared",
        "attention/backends/flash_attention.py",
        "out = out.masked_fill(masked_rows, 0.0)",
        "pass",
        BACKENDS + "flash_attention.py",
    ),
    fault(
        "fp16 gradients: never divided",
        "attention/fp16_gradients.py",
        "(grad / power).to(torch.float16), power, None",
        "grad.to(torch.float16), power, None",
        ATTENTION + "fp16_gradients.py",
    ),
    # -- selection and the circuit breaker
    fault(
        "selection: a preference excludes the others",
        "attention/selection.py",
        "return Candidates((name, *(other for other in MODULES if other != name)), True)",
        "return Candidates((name,), True)",
        ATTENTION + "dispatch.py",
    ),
    fault(
        "selection: strict does not pin",
        "attention/selection.py",
        "if pinned or settings.current().strict:",
        "if pinned:",
        ATTENTION + "dispatch.py",
        ATTENTION + "order.py",
    ),
    fault(
        "breaker: opens during a backward pass",
        "attention/breaker.py",
        "if phase is Phase.BACKWARD and",
        "if False and",
        RECOVERY + "guard.py",
        ATTENTION + "dispatch.py",
    ),
    fault(
        "breaker: a kept verdict survives a failure",
        "attention/breaker.py",
        "kept_verdicts.forget(",
        '"".format(',
        ATTENTION + "kept_verdicts.py",
    ),
    fault(
        "kept key: a library rewritten under its old time is not noticed",
        "attention/kernels/kept_key.py",
        "state.st_mtime_ns, state.st_ctime_ns",
        "state.st_mtime_ns, 0",
        KERNELS + "kept_key.py",
    ),
    fault(
        "breaker: a backend that is out is used",
        "attention/dispatch.py",
        "verdict.state is State.OUT and name != replayed:",
        "False:",
        ATTENTION + "dispatch.py",
    ),
    fault(
        "selfcheck: no dropout check",
        "attention/selfcheck.py",
        "dropout:\n        return None\n",
        "dropout or True:\n        return None\n",
        ATTENTION + "selfcheck.py",
    ),
    fault(
        "plans: a plan outlives the settings",
        "attention/plans.py",
        "or plan.settings is not settings.current()",
        "or False",
        ATTENTION + "dispatch.py",
        ATTENTION + "order.py",
        BIAS + "windows.py",
    ),
    # -- recovery
    fault(
        "errors: a lost CUDA context is survived",
        "attention/recovery/errors.py",
        "isinstance(error, Exception) and not sticky(error) and not control_flow(error)",
        "isinstance(error, Exception) and not control_flow(error)",
        ATTENTION + "dispatch.py",
        RECOVERY + "guard.py",
        RECOVERY + "blame.py",
    ),
    fault(
        "errors: frames keep their tensors",
        "attention/recovery/errors.py",
        "traceback.clear_frames(error.__traceback__)",
        "pass",
        ATTENTION + "dispatch.py",
        RECOVERY + "guard.py",
    ),
    fault(
        "recovery: the random state is not restored",
        "attention/recovery/forward.py",
        "random_state.restore(state)",
        "pass",
        ATTENTION + "dispatch.py",
        RECOVERY + "guard.py",
    ),
    fault(
        "recovery: the last backend's error is hidden",
        "attention/recovery/forward.py",
        "if verdict is Blame.CALLER or verdict is Blame.CONTEXT and last:",
        "if verdict is Blame.CALLER:",
        RECOVERY + "blame.py",
    ),
    fault(
        "recovery: no breaker after a failed backward",
        "attention/recovery/backward.py",
        "breakers.open(",
        '"".format(',
        RECOVERY + "guard.py",
    ),
    fault(
        "guard: the graph is used twice",
        "attention/recovery/guard.py",
        "self.graph if keep else None",
        "self.graph",
        RECOVERY + "guard.py",
    ),
    fault(
        "replay: another backend recomputes",
        "attention/recovery/replay.py",
        "            return self._calls[self.call_index]\n",
        "            return None\n",
        ATTENTION + "dispatch.py",
        RECOVERY + "guard.py",
    ),
    fault(
        "replay: a bias changed in place is recomputed",
        "attention/recovery/replay.py",
        "if tensor._version != version:",
        "if False:",
        PATCHING + "checkpoints.py",
    ),
    fault(
        "replay: recomputation without the patches",
        "attention/recovery/replay.py",
        "if self.biased and self._uninstalls != _uninstalls:",
        "if False:",
        PATCHING + "checkpoints.py",
    ),
    fault(
        "replay: a choice is made again",
        "attention/recovery/replay.py",
        "if self._next_choice >= len(self._choices):",
        "if True:",
        PATCHING + "auto_factorize.py",
        PATCHING + "checkpoints.py",
        RECOVERY + "replay.py",
    ),
    fault(
        "dropout replay: another counter",
        "attention/kernels/*.py",
        "nil + (keys & ~9), nil + (rows & ~8)",
        "nil + (keys & ~8), nil + (rows & ~8)",
        KERNELS + "operator.py",
        "-k=dropout or keep or backward",
    ),
    # -- patching
    fault(
        "call adapter: the key's bias for the query",
        "patching/call_adapter.py",
        "weight[:width], None if bias is None else bias[:width]",
        "weight[:width], None if bias is None else bias[width : 2 * width]",
        PATCHING + "parity.py",
    ),
    fault(
        "call adapter: the operation's name is ignored",
        "patching/call_adapter.py",
        'if name in ("self_attn", "cross_attn"):',
        "if False:",
        PATCHING + "bias_ways.py",
        PATCHING + "inner_attention.py",
    ),
    fault(
        "call adapter: a view of the query is another key",
        "patching/call_adapter.py",
        "key is None or key is query or _same_memory(query, key)",
        "key is None or key is query",
        PATCHING + "inner_attention.py",
        PATCHING + "bias_ways.py",
    ),
    fault(
        "wrappers: flash-attn's padding is inverted",
        "patching/*.py",
        "None if keep is None else ~keep.bool()",
        "None if keep is None else keep.bool()",
        PATCHING + "parity.py",
    ),
    fault(
        "wrappers: a parent's forward is a second call",
        "patching/*.py",
        "parent is not None and parent.module is module",
        "False",
        PATCHING + "inner_attention.py",
    ),
    fault(
        "wrappers: an unknown option is ignored",
        "patching/*.py",
        "if value is not None and value is not default:",
        "if False:",
        PATCHING + "parity.py",
        PATCHING + "inner_attention.py",
    ),
    fault(
        "context: every attention is the first",
        "patching/context.py",
        "index = scope.order.setdefault(module, len(scope.order))",
        "index = 0",
        PATCHING + "bias_ways.py",
        PATCHING + "inner_attention.py",
    ),
    fault(
        "context: a block ends those around it",
        "patching/context.py",
        "if other.block is not block)",
        "if False)",
        PATCHING + "bias_ways.py",
        PATCHING + "inner_attention.py",
        PATCHING + "threads.py",
    ),
    fault(
        "threads: a bias outlives its block",
        "patching/context.py",
        "for scope in _inherited.get() if scope.block.open)",
        "for scope in _inherited.get())",
        PATCHING + "threads.py",
    ),
    fault(
        "import shim: every handler catches ImportError",
        "patching/import_shim.py",
        "return _last_name(kind) not in _OTHER_ERRORS",
        "return True",
        PATCHING + "import_shim.py",
    ),
    fault(
        "import shim: star imports bind nothing",
        "patching/import_shim.py",
        'if item == "*":',
        "if False:",
        PATCHING + "import_shim.py",
    ),
    fault(
        "install: uninstall overwrites others' changes",
        "patching/install.py",
        "if wrapper is None or vars(owner).get(claim.attribute) is not wrapper:",
        "if wrapper is None:",
        PATCHING + "install.py",
    ),
    # -- AQR
    fault(
        "aqr: no eps",
        "aqr/router.py",
        "(routing.weights + self.eps).log()",
        "routing.weights.log()",
        AQR + "router.py",
    ),
    fault(
        "aqr: no locality",
        "aqr/router.py",
        "return modality + self._locality(routing.places, scale)",
        "return modality",
        AQR + "router.py",
    ),
    fault(
        "aqr windows: the last camera instead of the first",
        "aqr/window_router.py",
        "torch.arange(len(grids), 0, -1, ",
        "torch.arange(1, len(grids) + 1, ",
        AQR + "window_router.py",
    ),
    fault(
        "aqr windows: scale without limits",
        "aqr/window_router.py",
        ".clamp(self.min_scale, self.max_scale)",
        "",
        AQR + "window_router.py",
    ),
    fault(
        "aqr supervision: the wrong sensor",
        "aqr/supervision.py",
        "        if sensor == CAMERA:\n",
        "        if sensor == LIDAR:\n",
        AQR + "transformers.py",
        AQR + "router.py",
    ),
    # -- monitor, settings
    fault(
        "monitor: a zero gradient is no cause",
        "monitor/parameters.py",
        '"zero": stepped and norm == 0.0,',
        '"zero": False,',
        "tests/monitor/test_parameters.py",
    ),
    fault(
        "monitor: scaled gradients",
        "monitor/*.py",
        "/ (1.0 if scale is None else scale)",
        "/ 1.0",
        "tests/monitor/test_steps.py",
    ),
    fault(
        "settings: no upper limit",
        "settings.py",
        "if not low <= value <= high:",
        "if not low <= value:",
        "tests/test_settings.py",
    ),
    fault(
        "settings: an empty variable is a value",
        "settings.py",
        "        if not text:\n",
        "        if False:\n",
        "tests/test_settings.py",
    ),
    # -- A/B
    fault(
        "ab statistics: a degree of freedom too many",
        "ab/statistics.py",
        "freedom = sum(x.size - 1 for x in logs)",
        "freedom = sum(x.size for x in logs)",
        AB + "statistics.py",
    ),
    fault(
        "ab statistics: tiny effects decide",
        "ab/statistics.py",
        "self.low > 1 and self.value > 1 + SMALLEST_EFFECT:",
        "self.low > 1:",
        AB + "statistics.py",
        AB + "verdict.py",
    ),
    fault(
        "ab verdict: faster is slower",
        "ab/verdict.py",
        '"slower": self.speed_word == "slower",',
        '"slower": self.speed_word == "faster",',
        AB + "verdict.py",
    ),
    fault(
        "ab verdict: a failed run fires nothing",
        "ab/verdict.py",
        "if conditions and self.failed:",
        "if False:",
        AB + "verdict.py",
    ),
    fault(
        "ab parity: a NaN on one side is no difference",
        "ab/parity.py",
        "np.where(one, np.inf, plain)",
        "np.where(one, 0.0, plain)",
        AB + "parity.py",
    ),
    # -- kernels, interpreted
    fault(
        "kernel forward: the running sum is not rescaled",
        "attention/kernels/forward.py",
        "    acc = acc * alpha[:, None]\n",
        "    acc = acc\n",
        KERNELS + "operator.py",
    ),
    fault(
        "kernel forward: segment weights not relative",
        "attention/kernels/forward.py",
        "weight = (weight - top) * LOG2E",
        "weight = weight * LOG2E",
        KERNELS + "operator.py",
    ),
    fault(
        "kernel forward: dropout without its scale",
        "attention/kernels/forward.py",
        "kept = kept / keep_scale",
        "kept = kept",
        KERNELS + "operator.py",
    ),
    fault(
        "kernel backward: half of delta",
        "attention/kernels/backward.py",
        "delta = tl.sum(out * do.to(tl.float32), 1)",
        "delta = tl.sum(out * do.to(tl.float32), 1) * 0.5",
        KERNELS + "operator.py",
    ),
    fault(
        "kernel tiles: no mask at the edge of pairs",
        "attention/kernels/common.py",
        "inside = inside & (first_key + keys < key_end)[None, :]",
        "pass",
        KERNELS + "operator.py",
        KERNELS + "bounds.py",
    ),
)


def files_of(tree: Path, place: str) -> List[Path]:
    package = tree / PACKAGE
    found = sorted(package.rglob("*.py"))
    return [p for p in found if fnmatch.fnmatch(p.relative_to(package).as_posix(), place)]


def find(tree: Path, one: Fault) -> Tuple[Optional[Path], str]:
    """The file that holds the fault's text exactly once; or None and why."""
    holders = [(path, path.read_text().count(one.old)) for path in files_of(tree, one.place)]
    holders = [(path, count) for path, count in holders if count]
    total = sum(count for _, count in holders)
    if total != 1:
        return None, f"{one.old!r} occurs {total} times in {one.place}"
    return holders[0][0], ""


def missing_tests(tree: Path, one: Fault) -> List[str]:
    return [t for t in one.tests if not t.startswith("-") and not (tree / t).exists()]


def preload() -> None:
    """Import what nearly every test imports, once; `run_tests` forks from here."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.dont_write_bytecode = True
    for name in ("pytest", "torch", "hypothesis", "scipy.stats", "triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert PACKAGE not in sys.modules


def run_tests(tree: Path, tests: Tuple[str, ...]) -> Tuple[int, str]:
    """(pytest's exit status, the line that names what failed), from a process of its own."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            _run_in_child(tree, tests)
        deadline = time.monotonic() + SECONDS
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 1, f"no end within {SECONDS} s"
            time.sleep(0.1)
        output.seek(0)
        lines = output.read().splitlines()
    named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1  # a signal: the process crashed
    return code, (named or lines or [""])[-1][:160]


def _run_in_child(tree: Path, tests: Tuple[str, ...]) -> NoReturn:
    status = 1
    try:
        import pytest

        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        options = ["-q", "-x", "-p", "no:cacheprovider", "--disable-warnings"]
        status = int(pytest.main([*options, "-m", "not slow and not browser", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def check(tree: Path, one: Fault) -> Tuple[str, str]:
    """(killed, survived, not found or no tests; what is to be said about it)."""
    path, why = find(tree, one)
    if path is None:
        return "not found", why
    text = path.read_text()
    path.write_text(text.replace(one.old, one.new))
    try:
        status, last = run_tests(tree, one.tests)
    finally:
        path.write_text(text)
    if status == 0:
        return "survived", ", ".join(one.tests)
    return ("killed" if status in (1, 2) else "no tests"), last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--list", action="store_true", help="look for the anchors, run nothing")
    args = parser.parse_args()
    chosen = [one for one in FAULTS if args.only in one.name]
    if args.list:
        lost = [(one.name, find(ROOT, one)[1] or missing_tests(ROOT, one)) for one in chosen]
        lost = [(name, why) for name, why in lost if why]
        for name, why in lost:
            print(f"{name}: {why}")
        print(f"{len(chosen)} faults, {len(lost)} without an anchor or a test")
        return bool(lost)
    preload()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT,
            tree,
            ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "*.egg-info", "site"),
        )
        for one in chosen:
            start = time.monotonic()
            result, detail = check(tree, one)
            counts[result] += 1
            print(f"{result:9} {time.monotonic() - start:4.0f} s  {one.name}: {detail}", flush=True)
    print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))
    return bool(counts["survived"] or counts["not found"] or counts["no tests"])


if __name__ == "__main__":
    sys.exit(main())
