"""Chaos: whatever a command does, a clear message and a report."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from flashbias_patch.ab import outcome, processes, reading, records, report, runner, timing_notes
from flashbias_patch.ab import words as wording
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.runner import Options, schedule
from flashbias_patch.cli import ab as cli_ab

# A training loop as far as the runner can tell, without the seconds that importing torch takes.
STEPS = """
from flashbias_patch.ab import probe, process_lines
import os, sys, time
def train(steps, seconds=0.002, loss=lambda i: 1.0 / (i + 1), random="drawn"):
    record = probe._recorder
    record.write({"event": "torch", "version": "0"})
    for i in range(steps):
        time.sleep(seconds)
        record.write({"event": "step", "step": i, "wall_s": seconds, "loss": loss(i), "grad_norm": 1.0,
                      "memory": {"rss": 1e8, "rss_peak": 1e8}, **({} if i else {"random": random})})
        record.step = i + 1
        if record.limit and i + 1 >= record.limit:
            record.write({"event": "stop", "steps": i + 1})
            raise SystemExit(0)
"""  # noqa: E501


def command(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(STEPS + textwrap.dedent(body))
    return [sys.executable, str(script)]


def compare(tmp_path, words, **options):
    """A and B once each; returns (experiment, verdict), having checked every format of report."""
    out = str(tmp_path / "out")
    runner.run_all(
        words,
        out,
        Options(
            **{"repeats": 1, "steps": 12, "warmup": 2, "noise_run": False, "timeout": 20, **options}
        ),
    )
    experiment = reading.load(out)
    verdict = judge(experiment)
    assert experiment.runs and all(run.message for run in experiment.runs)
    for text, shown in ((report.text, str), (report.markdown, report.plain)):
        text = text(experiment, verdict)
        assert shown(wording.sentence(verdict)) in text
        for problem in verdict.problems:
            assert shown(problem) in text
    json.dumps(report.summary(experiment, verdict), allow_nan=False)
    pytest.importorskip("jinja2")
    assert "<html" in report.html(experiment, verdict)
    return experiment, verdict


def processes_with(mark):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if mark.encode() in file.read():  # a zombie has an empty one
                        found.append(int(name))
            except OSError:
                pass
    return found


@pytest.mark.parametrize(
    "repeats,noise,expected",
    [
        (1, True, "ABA"),
        (1, False, "AB"),
        (2, True, "ABBA"),
        (3, True, "ABBAAB"),
        (4, False, "ABBAABBA"),
    ],
)
def test_schedule(repeats, noise, expected):
    assert schedule(repeats, noise) == expected


def test_plain_command(tmp_path):
    experiment, verdict = compare(tmp_path, command(tmp_path, "train(100)"), noise_run=True)
    assert [run.name for run in experiment.runs] == ["A1", "B2", "A3"]
    assert all(run.status == "ok" and run.steps == 12 for run in experiment.runs)
    assert verdict.parity_word == "identical" and not verdict.problems


def test_deterministic_command_that_differs_gets_a_perturbed_run(tmp_path):
    body = "train(100, loss=lambda i: 1.0 + (1e-9 if os.environ['FLASHBIAS_PATCH'] == '1' else 0))"
    experiment, verdict = compare(tmp_path, command(tmp_path, body), noise_run=True)
    assert [run.nudged for run in experiment.runs] == [False, False, False, True]
    assert verdict.parity_word == "within rounding"


@pytest.mark.parametrize("drawn", ("as A", "otherwise"))
def test_a_reseeded_run_is_compared_with_a_reseeded_run(tmp_path, drawn):
    body = """
    patched, nudge = os.environ['FLASHBIAS_PATCH'] == '1', os.environ.get('FLASHBIAS_PROBE_NUDGE') or ''
    draw = 0.02 if patched else -0.02 if nudge.startswith('redraw') else 0.0
    train(100, loss=lambda i: 1.0 / (i + 1) * (1 + draw * (i > 0)), random="B" if patched and %r else "A")
    """ % (drawn == "otherwise")  # noqa: E501
    experiment, verdict = compare(tmp_path, command(tmp_path, body), noise_run=True)
    loss = verdict.parities[0]
    if drawn == "otherwise":
        assert [run.nudged for run in experiment.runs] == [False, False, False, True]
        assert experiment.runs[-1].redrawn and loss.word == "within noise" and loss.redrawn
        assert any(
            "random numbers" in note for note in verdict.notes
        ) and "redrawn A" in wording.parity_line(loss)
    else:
        assert not any(run.redrawn for run in experiment.runs) and loss.word == "differs"
        # Before "differs" is said: four nudged As, and a second B.
        assert [(run.label, run.nudged) for run in experiment.runs[3:]] == [("A", True)] * 4 + [
            ("B", False)
        ]
        assert not any("random numbers" in note for note in verdict.notes)


INJECTED = """
patched = os.environ['FLASHBIAS_PATCH'] == '1'
held = bytearray(os.urandom(1) * ({more_mib} * 2**20)) if patched else None
record = probe._recorder
last = None
for i in range(25):
    time.sleep(0.02 * (1 + ({slowdown} if patched else 0)))
    now = time.perf_counter()
    loss = 2.0 / (i + 1) * (1 + (0.1 if patched and i >= {part_at} else 0))
    record.write({{"event": "step", "step": i, "loss": loss, "grad_norm": 1.0, "memory": process_lines.resident_memory(),
                  **({{}} if last is None else {{"wall_s": now - last}})}})
    last = now
"""  # noqa: E501


@pytest.mark.parametrize(
    "slowdown,more_mib,part_at", [(0.0, 0, 99), (0.5, 0, 99), (0.0, 200, 99), (0.0, 0, 7)]
)
def test_known_differences_of_real_processes_are_found(
    tmp_path, monkeypatch, slowdown, more_mib, part_at
):
    """Time truly slept, memory truly held; what was not injected is not found."""
    monkeypatch.setattr(timing_notes, "BUSY_SHARE", 2.0)  # other tests may run beside this one
    body = INJECTED.format(slowdown=slowdown, more_mib=more_mib, part_at=part_at)
    experiment, verdict = compare(tmp_path, command(tmp_path, body), repeats=2, steps=25)
    assert not verdict.problems and all(run.steps == 25 for run in experiment.runs)
    assert (
        verdict.speed_word == "slower"
        if slowdown
        else verdict.speed_word in ("undecided", "no difference")
    )
    assert verdict.speed.value == pytest.approx(1 + slowdown, rel=0.15)
    assert (verdict.memory_word == "more memory") == bool(more_mib)
    assert (verdict.parity_word, verdict.first_step) == (
        ("differs", 7) if part_at == 7 else ("identical", None)
    )


def test_ends_by_itself_before_its_steps(tmp_path):
    experiment, _ = compare(tmp_path, command(tmp_path, "train(5)"))
    assert [run.message for run in experiment.runs] == [
        "ended by itself; 5 steps recorded of 12"
    ] * 2


def test_crash_of_the_patched_side_only(tmp_path):
    body = "train(6)\nif os.environ['FLASHBIAS_PATCH'] == '1': print('BOOM'); os._exit(3)"
    experiment, verdict = compare(tmp_path, command(tmp_path, body), repeats=2)
    assert [run.status for run in experiment.runs] == [
        "ok",
        "crashed",
        "ok",
    ]  # the crashed side is not repeated
    assert "exit status 3" in verdict.problems[0] and "B2 (patched)" in verdict.problems[0]
    assert "BOOM" in experiment.runs[1].log_tail and verdict.comparable
    assert wording.sentence(verdict).endswith(
        "Patched fails: B2 crashed after 6 of 12 steps: exit status 3."
    )
    assert (
        verdict.parity_word == "fails" and verdict.speed_word == verdict.memory_word == "undecided"
    )


def test_crash_before_any_step(tmp_path):
    experiment, verdict = compare(tmp_path, command(tmp_path, "import no_such_module"))
    assert not verdict.comparable
    says = wording.sentence(verdict)
    assert says.startswith(
        "Unpatched and patched fail: A1 crashed before its first step: exit status 1. B2 crashed"
    )
    assert "No module named 'no_such_module'" in experiment.runs[0].log_tail


def test_killed_by_a_signal(tmp_path):
    experiment, _ = compare(tmp_path, command(tmp_path, "train(8)\nos.kill(os.getpid(), 9)"))
    assert experiment.runs[0].status == "crashed" and "SIGKILL" in experiment.runs[0].message
    assert experiment.runs[0].killed and experiment.runs[0].steps == 8


def test_hang_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_TO_DIE", 1.0)
    mark = f"hang-{os.getpid()}-{time.monotonic_ns()}"
    body = f"""
        import subprocess, signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        words = [sys.executable, "-c", "import time; time.sleep(300)  # {mark}"]
        subprocess.Popen(words, start_new_session=True)
        train(4)
        time.sleep(300)
    """
    words = command(tmp_path, body)
    begin = time.monotonic()
    experiment, verdict = compare(tmp_path, words, timeout=3)
    assert time.monotonic() - begin < 90
    assert [run.status for run in experiment.runs] == ["hung", "hung"]
    assert "no step and no output for 3 s" in verdict.problems[0]
    assert processes_with(mark) == []


def test_forked_workers_left_behind_are_ended(tmp_path):
    mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
    body = f"""
        import subprocess
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # {mark}"])
        if os.fork() == 0:
            time.sleep(300)
        train(100)
    """
    experiment, _ = compare(tmp_path, command(tmp_path, body))
    assert all(run.status == "ok" and run.steps == 12 for run in experiment.runs)
    assert processes_with(mark) == []


def test_binary_output(tmp_path):
    body = """
        sys.stdout.buffer.write(bytes(range(256)) * 50 + b'\\x1b[31m</pre><script>alert(1)</script>')
        sys.stdout.flush()
        train(3)
        os._exit(1)
    """  # noqa: E501
    experiment, verdict = compare(tmp_path, command(tmp_path, body))
    assert "\\x00" in experiment.runs[0].log_tail and "\x1b" not in experiment.runs[0].log_tail
    assert "<script>alert" not in report.html(experiment, verdict)


def test_changes_directory_and_is_a_shell_script(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    words = command(tmp_path, "os.chdir('elsewhere')\ntrain(100)")
    script = tmp_path / "dist_train.sh"
    script.write_text(
        f'cd {tmp_path}\nexport PYTHONPATH="$(dirname $0)":$PYTHONPATH\n{" ".join(words)}\necho '
        "finished\n"
    )
    experiment, _ = compare(tmp_path, ["bash", str(script)])
    assert [(run.status, run.steps) for run in experiment.runs] == [("ok", 12)] * 2


def test_command_that_goes_on_after_its_steps_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(outcome, "GRACE_TO_END", 1.0)
    script = tmp_path / "run.sh"
    script.write_text(" ".join(command(tmp_path, "train(100)")) + "\nsleep 300\n")
    experiment, _ = compare(tmp_path, ["bash", str(script)])
    assert all(
        run.status == "ok" and "after its 12 steps" in run.message for run in experiment.runs
    )


@pytest.mark.parametrize(
    "words,message",
    [
        (["true"], "no Python process of the command loaded the probe"),
        ([sys.executable, "-I", "-c", "pass"], "no Python process of the command loaded the probe"),
        ([sys.executable, "-c", "pass"], "none of which imported torch"),
    ],
)
def test_no_steps(tmp_path, words, message):
    experiment, verdict = compare(tmp_path, words)
    assert [run.status for run in experiment.runs] == ["no steps", "no steps"]
    assert message in verdict.problems[0]


def test_command_that_cannot_be_started(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    experiment, _ = compare(tmp_path, [str(tmp_path / "notes.txt")])
    assert (
        experiment.runs[0].status == "not started"
        and "Permission denied" in experiment.runs[0].message
    )


def test_environment_of_a_side(tmp_path):
    body = """
        print('HAVE', *(os.environ.get(name) for name in ('ONLY', 'FLASHBIAS_PATCH', 'PYTHONHASHSEED')))
        train(12)
    """  # noqa: E501
    experiment, _ = compare(tmp_path, command(tmp_path, body), env_b={"ONLY": "b"}, seed=5)
    assert [run.log_tail.strip() for run in experiment.runs] == ["HAVE None 0 5", "HAVE b 1 5"]


def test_directory_of_a_killed_ab_is_still_reported(tmp_path):
    experiment, _ = compare(tmp_path, command(tmp_path, "train(12)"))
    path = tmp_path / "out" / "ab.json"
    document = json.loads(path.read_text())
    document["runs"].pop()  # as if killed during B
    path.write_text(json.dumps(document))
    found = reading.load(str(tmp_path / "out"))
    assert [(run.name, run.status, run.steps) for run in found.runs] == [
        ("A1", "ok", 12),
        ("B2", "interrupted", 12),
    ]


def test_not_a_comparison(tmp_path):
    with pytest.raises(records.NotARecord, match="holds no ab.json"):
        reading.load(str(tmp_path))


def cli(tmp_path, *words, **popen):
    return subprocess.Popen(
        [sys.executable, "-m", "flashbias_patch.cli.main", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launch_env(),
        # Who was started in the background ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **popen,
    )


def launch_env():
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return {**os.environ, "PYTHONPATH": home, "FLASHBIAS_PATCH": "0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_the_child_and_still_reports(tmp_path, number):
    words = command(tmp_path, "train(100000, seconds=0.05)")
    process = cli(tmp_path, "ab", "--steps", "90000", "--out", "out", "--", *words)
    deadline = time.monotonic() + 60
    probes = tmp_path / "out" / "runs" / "01-A" / "probe"
    while time.monotonic() < deadline and not any(
        p.read_bytes().count(b'"event": "step"') > 4 for p in probes.glob("*.jsonl")
    ):
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in output and (tmp_path / "out" / "report.md").exists()
    assert processes_with(words[-1]) == []
    assert (
        cli(tmp_path, "report", "out", "--markdown", "-")
        .communicate()[0]
        .startswith("## flashbias A/B")
    )


@pytest.mark.parametrize(
    "options, nudged", [([], True), (["--no-aa"], False), (["--eval", "last.pth"], False)]
)
def test_first_line_names_the_runs_that_may_follow(tmp_path, monkeypatch, capsys, options, nudged):
    """`make demo` says that it trains four times: A B A are three."""

    def run(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", run)
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    words = [
        *options,
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--",
        sys.executable,
        "{predictions}",
    ]
    assert cli_ab.main(parser.parse_args(words)) == cli_ab.INTERRUPTED
    line = capsys.readouterr().out.splitlines()[0]
    assert ("then a nudged A unless B is identical" in line) is nudged
    assert line.startswith("2 runs: A B (" if "--no-aa" in options else "3 runs: A B A (")


def test_fail_if_and_exit_statuses(tmp_path):
    words = command(
        tmp_path,
        "train(12, loss=lambda i: 1.0 + (0.5 if os.environ['FLASHBIAS_PATCH'] == '1' else 0))",
    )
    base = ["ab", "--repeats", "1", "--no-aa", "--steps", "12"]
    for extra, status, says in (
        (["--fail-if", "differs"], 1, "--fail-if condition met: differs"),
        ([], 0, "does not train the same"),
    ):
        process = cli(tmp_path, *base, "--out", f"out{status}", *extra, "--", *words)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, says in output + errors) == (status, True), output + errors
    assert json.loads((tmp_path / "out1" / "summary.json").read_text())["parity_word"] == "differs"
    process = cli(tmp_path, *base, "--out", "out3", "--", "true")
    assert process.communicate(timeout=60) and process.returncode == 3


@pytest.mark.parametrize(
    "words,says",
    [
        (["ab"], "CMD is missing"),
        (["ab", "--", "no-such-program"], "not a program on PATH"),
        (["ab", "--repeats", "0", "true"], "at least 1"),
        (["ab", "--env-a", "X", "true"], "NAME=VALUE"),
        (["ab", "--seed", "5000000000", "true"], "at most 4294967295"),
        (["ab", "--timeout", "inf", "true"], "at least 1"),
        (["ab", "--out", "file/x", "--", "true"], "file/x cannot be made: Not a directory"),
        (["ab", "--out", "x" * 300, "--", "true"], "cannot be made: File name too long"),
        (["ab", "--eval", "last.pth", "--", "true"], "no {predictions}"),
        (["report", "."], "holds no ab.json"),
    ],
)
def test_usage(tmp_path, words, says):
    (tmp_path / "file").write_text("")
    process = cli(tmp_path, *words)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and says in errors


@pytest.mark.slow
def test_torchrun_with_two_processes(tmp_path):
    """Real torch, real torchrun: both ranks recorded, both stopped at the same step."""
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for i in range(1000):
            loss = net(torch.ones(2, 4) * (dist.get_rank() + 1)).pow(2).mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    """)
    )
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    experiment, verdict = compare(tmp_path, words, timeout=120)
    for run in experiment.runs:
        assert (run.status, [len(p.steps) for p in run.ranks]) == ("ok", [12, 12]), run.log_tail
        assert run.environment["world_size"] == 2 and not run.killed
    assert verdict.parity_word == "identical"


def test_eval_compares_predictions(tmp_path):
    script = tmp_path / "infer.py"
    script.write_text(
        "import json, os, sys\n"
        "assert sys.argv[1] == 'last.pth'\n"
        "shift = 0.25 if os.environ['FLASHBIAS_PATCH'] == '1' else 0\n"
        "box = [1 + shift, 2, 0, 2, 4, 1.5, 0.1, 0, 0]\n"
        "json.dump({'classes': ['car'], 'samples': [{'token': 't', 'boxes': [box], 'scores': "
        "[0.5], "
        "'labels': [0]}]}, open(sys.argv[2], 'w'))\n"
    )
    words = [sys.executable, str(script), "{checkpoint}", "{predictions}"]
    process = cli(
        tmp_path, "ab", "--repeats", "1", "--out", "out", "--eval", "last.pth", "--", *words
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    assert "A against B: 1 matched" in output and "centre (m) 0.25" in output
    assert "Nothing to compare" not in output
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert kept["detections"]["a_b"]["differences"]["centre (m)"]["largest"] == pytest.approx(0.25)
    assert "A against A" in (tmp_path / "out" / "report.html").read_text()
    assert (
        kept["sentence"].startswith("Zero attention calls went through the patch.")
        and kept["parity_word"] == "differs"
    )


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_rich_terminal(tmp_path):
    pytest.importorskip("rich")
    main, side = os.openpty()
    words = command(tmp_path, "train(12)")
    process = subprocess.Popen(
        [sys.executable, "-m", "flashbias_patch.cli.main", "ab", "--repeats", "1", "--steps", "12"]
        + ["--out", "out", "--", *words],
        cwd=tmp_path,
        stdout=side,
        stderr=subprocess.PIPE,
        env={**launch_env(), "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        shown += piece
    assert process.wait(timeout=60) == 0, process.stderr.read()
    text = shown.decode()
    assert (
        "A unpatched" in text
        and "12/12" in text
        and "time per step" in text
        and "identical" in text
    )


def test_out_of_memory_unpatched_only_is_the_best_result(tmp_path):
    body = """
    if os.environ["FLASHBIAS_PATCH"] == "0":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB"); sys.exit(1)
    train(100)
    """
    process = cli(
        tmp_path,
        "ab",
        "--steps",
        "12",
        "--out",
        "out",
        "--fail-if",
        "differs",
        "--",
        *command(tmp_path, body),
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    assert (
        "Unpatched runs out of memory; patched trains at 2" in output
        and "A1 (unpatched): out of memory" in output
    )
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert kept["failed"] is False and [run["status"] for run in kept["runs"]] == [
        "out of memory",
        "ok",
        "ok",
    ]


@pytest.mark.parametrize(
    "body",
    [
        "train(6 if B else 100)",
        "if B: train(6); os._exit(3)\ntrain(100)",
        "if B: import no_module\ntrain(100)",
    ],
)
def test_a_failed_run_is_no_success_under_any_condition(tmp_path, body):
    words = command(tmp_path, "B = os.environ['FLASHBIAS_PATCH'] == '1'\n" + body)
    for extra, status in (["--fail-if", "slower"], 1), ([], 3):
        process = cli(
            tmp_path,
            "ab",
            "--no-aa",
            "--steps",
            "12",
            "--out",
            f"out{status}",
            *extra,
            "--",
            *words,
        )
        output, errors = process.communicate(timeout=60)
        assert process.returncode == status, output + errors
        assert "Patched fails: B2" in output


def test_a_record_that_vanishes_ends_the_run_and_keeps_what_was_read(tmp_path):
    body = """
    import shutil
    try:
        train(8, seconds=0.1)
    finally:
        if os.environ["FLASHBIAS_PATCH"] == "1": shutil.rmtree("out")
        time.sleep(60)
    """
    words = command(tmp_path, body)
    begin = time.monotonic()
    options = ["--steps", "90", "--no-aa", "--repeats", "1", "--timeout", "5", "--out", "out"]
    process = cli(tmp_path, "ab", *options, "--", *words)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3 and time.monotonic() - begin < 50, output + errors
    lost = (
        r"B2 \(patched\): record lost after \d+ of 90 steps: it could not be watched and was "
        r"ended \(FileNotFoundError"
    )
    assert re.search(lost, output)
    assert "8 steps recorded" in output and processes_with(words[-1]) == []
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"]


def test_a_full_disk_is_reported_and_costs_files_only(tmp_path, monkeypatch):
    experiment = reading.build(str(tmp_path / "file" / "out"), {"command": ["true"]}, [])
    (tmp_path / "file").write_text("")
    runner.save_document(experiment, {"runs": []})
    assert "Not a directory" in experiment.lost


def test_pythonpath_of_one_side_keeps_the_probe(tmp_path):
    """Two checkouts are compared so."""
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "plugin.py").write_text(f"loss = {ord(side)}")
    body = "import plugin\ntrain(100, loss=lambda i: plugin.loss)"
    experiment, verdict = compare(
        tmp_path,
        command(tmp_path, body),
        env_a={"PYTHONPATH": str(tmp_path / "a")},
        env_b={"PYTHONPATH": str(tmp_path / "b")},
    )
    assert [run.steps for run in experiment.runs] == [12, 12] and verdict.first_step == 0
    assert [run.series("loss")[0] for run in experiment.runs] == [97, 98]


def test_the_commands_own_work_is_not_others(tmp_path):
    """Two seconds of one CPU's work in a child."""
    body = "end = time.process_time() + 2\nwhile time.process_time() < end: pass\ntrain(12)"
    machine = processes.Machine()
    compare(tmp_path, command(tmp_path, body))
    found = machine.since()
    if found:  # /proc/stat can be read
        whole, busy, own = (y - x for x, y in zip(machine.begin, machine.read()))
        assert own >= 4 and found["others"] <= (busy - 4) / whole * (os.cpu_count() or 1) + 0.5


def test_a_closed_terminal_does_not_end_the_runs(tmp_path):
    words = command(tmp_path, "train(12)")
    process = cli(
        tmp_path, "ab", "--repeats", "1", "--no-aa", "--steps", "12", "--out", "out", "--", *words
    )
    process.stdout.close()
    process.wait(timeout=60)
    assert len(json.loads((tmp_path / "out" / "ab.json").read_text())["runs"]) == 2
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux ends children with their parent")
def test_killed_by_sigkill_its_child_ends(tmp_path):
    words = command(tmp_path, "time.sleep(300)")
    process = cli(tmp_path, "ab", "--steps", "12", "--out", "out", "--", *words)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(processes_with(words[-1])) < 2:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and processes_with(words[-1]):
        time.sleep(0.05)
    assert processes_with(words[-1]) == []


@pytest.mark.parametrize("process,steps", [(None, 12), ("second", 9)])
def test_a_second_training_of_the_command_may_come_to_its_end(
    tmp_path, monkeypatch, process, steps
):
    monkeypatch.setattr(outcome, "GRACE_TO_END", 2.0)
    for name, body in (
        ("first", "train(100)"),
        ("second", "time.sleep(0.5)\ntrain(9, seconds=0.4)"),
    ):
        words = command(tmp_path, body)
        os.rename(words[1], tmp_path / f"{name}.py")
    (tmp_path / "both.sh").write_text(
        "".join(f"{sys.executable} {tmp_path}/{name}.py\n" for name in ("first", "second"))
    )
    experiment, verdict = compare(tmp_path, ["bash", str(tmp_path / "both.sh")], process=process)
    assert [(run.status, run.steps) for run in experiment.runs] == [("ok", steps)] * 2
    assert any("1 first.py (12 steps), 2 second.py (9 steps)" in note for note in verdict.notes)
