"""`--mode infer`: forward passes as iterations, their outputs compared."""

from __future__ import annotations

import argparse
import sys

import pytest

from flashbias_patch.ab import charts, inference, page, repeats, report, sides, words
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.records import Run
from flashbias_patch.ab.runner import Options
from flashbias_patch.cli import ab as cli_ab

from . import synthetic
from .test_probe import python
from .test_runner import compare

torch = pytest.importorskip("torch")

INFER = {"FLASHBIAS_PROBE_MODE": "infer"}
MODEL = """
class Head(torch.nn.Module):
    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(4, 3)
    def forward(self, x): return {"scores": self.linear(x).sigmoid(), "labels": x.argmax(-1)}
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 4), Head()
    def forward(self, x): time.sleep(0.01); return [self.head(self.body(x))]
torch.manual_seed(0)
model = Model().eval()
"""


def infer(tmp_path, body, **env):
    process, output, found = python(tmp_path, MODEL + body, **INFER, **env)
    return process, output, found[0]


def test_forward_passes_without_gradients_are_iterations(tmp_path):
    body = """
torch.nn.ReLU()(torch.ones(3))  # no iteration once the model is called
with torch.no_grad():
    for i in range(50): time.sleep(0.02); model(torch.ones(2, 4) * i)
print("not reached")
"""
    process, output, found = infer(tmp_path, body, FLASHBIAS_PROBE_STEPS="5")
    assert process.returncode == 0 and "not reached" not in output, output
    assert len(found.steps) == 5 and found.stopped and found.ended and not found.notes
    for line in found.steps:
        assert 0.01 <= line["wall_s"] < line.get("loop_s", 1.0)
        assert set(line["outputs"]) == {"[0].scores", "[0].labels"}
        assert "loss" not in line and line["memory"]["rss"] > 0
    assert len({line["output"] for line in found.steps}) == 5
    assert Run("A", 0, processes=[found]).series("output")[1] == found.steps[1]["output"]


@pytest.mark.parametrize(
    "body, steps",
    [
        ("model.train()\nfor i in range(3): model(torch.ones(2, 4))", 0),  # training
        ("for i in range(3): model(torch.ones(2, 4))", 3),  # eval mode, gradients on
        ("model.train()\nwith torch.inference_mode(): model(torch.ones(2, 4))", 1),
        ("model.head(torch.ones(2, 4)); model(torch.ones(2, 4))", 1),  # the larger one counts
        ("model(torch.ones(2, 4)); model.head(torch.ones(2, 4))", 1),
        ("torch.jit.trace(model.body, torch.ones(2, 4), check_trace=False)", 0),
    ],
)
def test_which_calls_count(tmp_path, body, steps):
    process, output, found = infer(tmp_path, body)
    assert process.returncode == 0, output
    assert len(found.steps) == steps and not found.notes


@pytest.mark.parametrize("name", ["Head", "head"])
def test_a_module_that_is_named(tmp_path, name):
    body = "for i in range(4): model(torch.ones(2, 4))"
    process, output, found = infer(tmp_path, body, FLASHBIAS_PROBE_MODULE=name)
    assert process.returncode == 0 and len(found.steps) == 4, output
    assert set(found.steps[0]["outputs"]) == {"scores", "labels"}
    assert all(line["wall_s"] < 0.01 for line in found.steps[1:])  # without the model's sleep


def test_an_error_of_the_model_passes_through(tmp_path):
    body = """
try: model(torch.ones(2, 5))
except RuntimeError as error: print("shapes" in str(error))
model(torch.ones(2, 4))
"""
    process, output, found = infer(tmp_path, body)
    assert process.returncode == 0 and "True" in output and len(found.steps) == 1


def test_a_nudge_moves_the_outputs_a_little(tmp_path):
    body = "for i in range(2): model(torch.ones(2, 4))"
    (_, _, plain), (_, _, nudged) = (
        infer(tmp_path / which, body, **env)
        for which, env in (("a", {}), ("b", {"FLASHBIAS_PROBE_NUDGE": "1"}))
        if not (tmp_path / which).mkdir()
    )
    a, b = ([line["output"] for line in p.steps] for p in (plain, nudged))
    assert all(0 < abs(x - y) / x < 1e-4 for x, y in zip(a, b))


def test_outputs_of_all_kinds_are_found():
    import dataclasses

    import numpy as np

    class Boxes:
        tensor = torch.ones(2, 9)

    @dataclasses.dataclass
    class Result:
        scores: object

    output = (
        {"a": torch.ones(2), "b": [np.zeros((2, 2), "float32"), 3.0, True], "text": "no"},
        Boxes(),
        Result(torch.ones(4)),
        None,
    )
    found = inference.tensors_of(torch, output)
    assert [name for name, _ in found] == ["[0].a", "[0].b[0]", "[0].b[1]", "[0].b[2]", "[1]"] + [
        "[2].scores"
    ]
    assert inference.tensors_of(torch, torch.ones(2))[0][0] == "output"
    loop = []
    loop.append(loop)
    assert inference.tensors_of(torch, loop) == []
    assert len(inference.tensors_of(torch, [torch.ones(1)] * 99)) == inference.MOST_OUTPUTS


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
)
def test_a_sketch_shows_what_changed(dtype):
    sketch = inference.Sketcher(torch)
    x = (torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    assert sketch(x) == sketch(x.clone()) and sketch(x).dtype == torch.float64
    y = x.clone()
    y[3, 2] = 0 if bool(x[3, 2]) else 1
    assert sketch(y) != sketch(x)
    if dtype.is_floating_point:
        assert sketch(x.flip(0)) != sketch(x)  # the same values in other places
        near = (x.double() * (1 + 1e-3)).float()
        assert abs(sketch(near) / sketch(x.float()) - 1) < 2e-3
    assert sketch(x[:0]) == 0
    assert torch.isnan(sketch(torch.tensor([float("nan"), 1.0])))


def outputs(difference, a=0.1, b=0.1):
    """An inference A B B A whose outputs differ by so much, relatively."""
    runs = []
    for index, label in enumerate("ABBA"):
        factor = 1 + difference * (label == "B")
        runs.append(
            synthetic.make_run(
                label,
                index,
                [a if label == "A" else b] * 30,
                output=lambda i, f=factor: (2.0 + i) * f,
                outputs=lambda i, f=factor: {"boxes": (1.0 + i) * f, "scores": 1.0 * f},
            )
        )
    return synthetic.experiment(runs, mode="infer", steps=30)


@pytest.mark.parametrize(
    "difference, word, says",
    [
        (0.0, "identical", "gives identical outputs"),
        (1e-6, "within rounding", "gives the same outputs within rounding"),
        (0.2, "differs", "does not give the same outputs from step 0 on"),
    ],
)
def test_outputs_are_judged_and_named(difference, word, says):
    found = outputs(difference)
    verdict = judge(found)
    assert verdict.parity_word == word and says in words.sentence(verdict)
    assert verdict.fails(["differs"]) == (["differs"] if word == "differs" else [])
    text = report.text(found, verdict)
    assert "outputs: " + word in text and "loss" not in text
    assert page.headlines(verdict)[2]["title"] == "Outputs"
    drawn = charts.all_of(found, verdict)
    assert {"Outputs", "Step time"} <= {chart["title"] for chart in drawn}
    assert not any(chart["x"] == "optimiser step" for chart in drawn)
    assert [row["name"] for row in page.parts_table(found, verdict)] == ["boxes", "scores"]
    report.markdown(found, verdict)
    report.summary(found, verdict)
    pytest.importorskip("jinja2")
    assert "<h2>Outputs" in report.html(found, verdict)


def script(tmp_path, body):
    path = tmp_path / "infer.py"
    path.write_text("import sys, time, torch\n" + MODEL + body)
    return [sys.executable, "-W", "ignore", str(path)]


def test_a_training_run_without_steps_says_that_inference_can_be_compared(tmp_path):
    body = "with torch.no_grad():\n    for i in range(9): model(torch.ones(2, 4))"
    experiment, verdict = compare(tmp_path, script(tmp_path, body), timeout=100)
    assert "Model made a forward pass: is it inference (`--mode infer`)?" in verdict.problems[0]
    assert Options().mode == "train"


def test_inference_from_end_to_end(tmp_path):
    body = "with torch.no_grad():\n    for i in range(90): model(torch.ones(2, 4) * (i + 1))"
    experiment, verdict = compare(
        tmp_path, script(tmp_path, body), timeout=100, mode="infer", noise_run=True
    )
    assert [run.steps for run in experiment.runs] == [12, 12, 12]
    assert verdict.parity_word == "identical" and verdict.of_outputs and verdict.speed is not None


def test_inference_of_three_sides_with_as_many_repeats_as_it_takes(tmp_path):
    """The intervals of all sides are looked at after each repeat, at levels of their own."""
    body = "with torch.no_grad():\n    for i in range(90): model(torch.ones(2, 4) * (i + 1))"
    further = [sides.Side("off", {"FLASHBIAS_PATCH": "0"})]
    how = {"mode": "infer", "repeats": "auto", "half_width": 1e6, "sides": further}
    experiment, verdict = compare(tmp_path, script(tmp_path, body), timeout=100, **how)
    assert experiment.schedule == "ABCCBA" and experiment.stopped == repeats.NARROW
    for each in verdict.every:
        assert each.parity_word == "identical" and each.of_outputs and each.speed is not None
        assert each.speed.level > 99
        assert any(n.startswith("2 repeats made the interval as narrow") for n in each.notes)


@pytest.mark.parametrize(
    "given, says",
    [
        (["--module", "X"], "--module: only with --mode infer"),
        (["--mode", "infer", "--eval", "x"], "--mode infer: not with --eval"),
    ],
)
def test_usage(given, says, capsys):
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    assert cli_ab.main(parser.parse_args([*given, "--", "true", "{predictions}"])) == 2
    assert says in capsys.readouterr().err
