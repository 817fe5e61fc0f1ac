"""The search for tile shapes, on a GPU of the tests' own: it costs what they say, and a fake clock
counts it."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")
from triton.runtime.errors import OutOfResources  # noqa: E402

from flashbias_patch.attention import tuning as tune  # noqa: E402
from flashbias_patch.attention import tuning_trial as trial  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.kernels import launcher, tiles  # noqa: E402
from flashbias_patch.attention.kernels.tiles import INTERPRETED, KERNELS, Config  # noqa: E402
from tests.support import internals  # noqa: E402

SHIPPED = INTERPRETED
BEST = Config(64, 32, 8, 3, registers=128)

pytestmark = pytest.mark.usefixtures("untuned")


def call(M=40, N=60, R=4, dtype=torch.float16, **rest):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    q, k, v = draw(1, M, 2, 16), draw(1, N, 2, 16), draw(1, N, 2, 16)
    factors = (draw(1, M, 1, R), draw(1, N, 1, R)) if R else (None, None)
    return AttentionInputs(q, k, v, *factors, scale=0.25, **rest)


def away(config, best=BEST):
    """Milliseconds that grow by a tenth with each field that is not the best one's."""
    return 1.0 * 1.1 ** sum(a != b for a, b in zip(config, best))


class World:
    """launcher.forward and backward, and the timer and clock that go with them."""

    def __init__(
        self,
        monkeypatch,
        cost=away,
        compiling=0.0,
        fails=lambda config: None,
        wrong=lambda config, M: False,
    ):
        self.cost, self.compiling, self.fails, self.wrong = cost, compiling, fails, wrong
        self.now, self.compiled, self.runs, self.M = 0.0, set(), [], 0
        monkeypatch.setattr(launcher, "forward", self.forward)
        monkeypatch.setattr(launcher, "backward", self.backward)

    def launched(self, kernel, problem):
        key = tiles.Key(kernel, 0, True, 16, 16, not problem.dropout_p)
        config, self.M = tiles.candidates(key)[0], problem.q.shape[1]
        if (kernel, config, self.M) not in self.compiled:
            self.compiled.add((kernel, config, self.M))
            self.now += self.compiling
        if self.fails(config):
            raise self.fails(config)
        self.last = config
        return 3.0 if self.wrong(config, self.M) else 1.0

    def forward(self, problem, seed, training):
        out = torch.full_like(problem.q, self.launched("forward", problem))
        return out, None, torch.zeros(problem.q.shape[2], problem.q.shape[1])

    def backward(self, problem, needs, passed):
        kernel = "keys" if needs.k else "queries"
        assert any(needs) and not (needs.k and needs.q)
        return (torch.full_like(problem.q, self.launched(kernel, problem)),)

    def timer(self, function, repeats):
        function()
        ms = self.cost(self.last, self.M) if self.cost is not away else away(self.last)
        self.now += repeats * ms / 1e3
        self.runs.append((self.last, repeats))
        return [ms] * repeats

    def tune(self, calls=None, **options):
        options = {"seconds": 1e6, **options}
        return tune.tune(calls or call(), timer=self.timer, clock=lambda: self.now, **options)


def test_the_fastest_wins_and_is_remembered(monkeypatch):
    before = tiles.generation
    said = []
    report = World(monkeypatch).tune(progress=lambda *now: said.append(now))
    assert [row.kernel for row in report.rows] == list(KERNELS)
    for row in report.rows:
        assert (row.shipped, row.tuned, row.why) == (SHIPPED, BEST, "")
        assert row.ratio == pytest.approx(1.1**-5)
        assert internals.tuned_tiles()[row.key] == BEST and row.key == trial.class_of(
            call(), row.kernel
        )
    assert tiles.generation > before and not internals.forced_tiles()
    assert all(
        0 <= elapsed <= seconds for elapsed, seconds, _ in said
    ) and "keys 64 x 32, 8 warps" in str(said)
    internals.reread_tiles(monkeypatch)
    tiles.candidates(trial.class_of(call())._replace(arch=90))
    assert internals.tuned_tiles()[trial.class_of(call())] == BEST, "it is on disk"


def test_kernels_and_remembering_are_the_callers_choice(monkeypatch):
    report = World(monkeypatch).tune(kernels=["queries"], remember=False)
    assert [row.kernel for row in report.rows] == ["queries"] and report.rows[0].tuned == BEST
    assert not internals.tuned_tiles()


@pytest.mark.parametrize("where", ["in the call", "in the small one"])
def test_a_shape_with_another_result_is_rejected(monkeypatch, where):
    small = trial.SMALL[0]
    world = World(
        monkeypatch,
        wrong=lambda config, M: config == BEST and (small == M) == (where == "in the small one"),
    )
    for row in world.tune().rows:
        assert row.tuned not in (None, BEST) and away(row.tuned) == pytest.approx(1.1)
        assert "off by" in row.skipped[BEST]


def test_a_result_that_is_not_a_number_is_rejected():
    one = torch.ones(4)
    assert not trial.distance([one * float("nan")], [one]) <= 1e9
    assert (
        trial.distance([one * float("inf")], [one * float("inf")]) == 0
    )  # a row without keys, in both
    assert not trial.distance([one], [one * float("inf")]) <= 1e9
    late = torch.ones(10_000)
    late[-1] = 2
    assert trial.distance([late], [torch.ones(10_000)]) == 1, "one wrong element shows"


@pytest.mark.parametrize("compiling, seconds", [(7.0, 60.0), (1.0, 30.0), (100.0, 10.0)])
def test_the_time_given_is_kept(monkeypatch, compiling, seconds):
    world = World(monkeypatch, compiling=compiling)
    report = world.tune(seconds=seconds)
    runs = 0.2  # what the timed runs of one step take
    assert report.seconds == world.now <= seconds + compiling + runs
    why = {row.why for row in report.rows if row.tuned is None}
    if compiling == 1.0:
        assert not why, "what was found in the time is used"
    else:
        assert (
            why
            <= {"the time was up", "nothing is 3% faster, of the shapes that there was time for"}
            and why
        )


def test_what_could_not_be_checked_in_time_is_not_remembered(monkeypatch):
    """The clock stops after the small call's check, before the comparison."""
    world = World(monkeypatch)
    forward = world.forward

    def slow_small(problem, seed, training):
        first = tiles.candidates(trial.class_of(call()))[0] == SHIPPED
        world.now += 1e9 if problem.q.shape[1] == trial.SMALL[0] and not first else 0
        return forward(problem, seed, training)

    monkeypatch.setattr(launcher, "forward", slow_small)
    (row,) = world.tune(kernels=["forward"]).rows
    assert row.tuned is None and row.why == "the time was up" and not internals.tuned_tiles()


@pytest.mark.parametrize("ratio, taken", [(0.98, False), (0.96, True), (1.2, False)])
def test_margin(monkeypatch, ratio, taken):
    world = World(
        monkeypatch,
        cost=lambda config, M: {SHIPPED: 1.0, BEST: ratio}.get(config, 1.5 if ratio < 1 else 1.2),
    )
    monkeypatch.setattr(tune, "shapes_near", lambda key, config: [SHIPPED, BEST])
    (row,) = world.tune(kernels=["forward"]).rows
    assert (row.tuned == BEST, bool(internals.tuned_tiles())) == (taken, taken)
    assert taken or "3% faster" in row.why


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("PassManager::run failed"),
        MemoryError("none left"),
    ],
)
def test_what_does_not_fit_or_compile_is_left_out(monkeypatch, error):
    world = World(monkeypatch, fails=lambda config: error if config.warps == 8 else None)
    for row in world.tune().rows:
        assert row.tuned == BEST._replace(warps=4)
        assert all(type(error).__name__ in why for why in row.skipped.values()) and row.skipped


def test_a_lost_gpu_ends_it(monkeypatch, caplog):
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    world = World(monkeypatch, fails=lambda config: lost if config.block_n == 32 else None)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        world.tune()
    assert (
        "the forward kernel was tried with 32 x 32, 4 warps" in caplog.text
        and not internals.forced_tiles()
    )


def test_a_shape_that_is_clearly_slower_is_run_once(monkeypatch):
    world = World(monkeypatch, cost=lambda config, M: 5.0 if config.block_m == 64 else 1.0)
    world.tune(kernels=["forward"])
    slow = [repeats for config, repeats in world.runs if config.block_m == 64]
    other = [repeats for config, repeats in world.runs if config.block_m != 64]
    assert set(slow) == {1} and max(other) == 10


@pytest.mark.parametrize("counts", [True, False])
def test_no_other_call_of_the_class_may_become_slower(monkeypatch, counts):
    """Unless it is too short for the kernels to matter."""
    monkeypatch.setattr(trial, "LEAST", 1 if counts else 1 << 40)
    world = World(
        monkeypatch, cost=lambda config, M: away(config) if M == 40 else 1 + (config.block_m == 64)
    )
    (row,) = world.tune([call(), call(M=48)], kernels=["forward"]).rows
    assert row.tuned == (None if counts else BEST)
    with pytest.raises(ValueError, match="calls: expected one class of call"):
        world.tune([call(), call(R=0)])


def test_float32_stays_with_four_warps():
    """Eight with products by tf32x3 end in an illegal access."""
    for half in (True, False):
        for arch in (80, 90):
            key = tiles.Key("keys", arch, half, 32, 16, True)
            shipped = tiles.shipped(key)[0]
            grid = tune.shapes_near(key, shipped)
            assert {config.warps for config in grid} == ({4, 8} if half else {4})
            assert grid[0] == shipped and len(grid) == len(set(grid)) <= 18
            assert all(
                0.5 <= c.block_m / shipped.block_m <= 2 and 16 <= c.block_n <= 128 for c in grid
            )


def test_random_state_and_modes_are_left_alone(monkeypatch):
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.get_rng_state(), random.getstate()
    with torch.inference_mode():
        World(monkeypatch).tune(call(dropout_p=0.1))
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), expected[0]) and random.getstate() == expected[1]


FEATURES = {
    "factors, mask and padding": dict(
        mask=torch.rand(1, 1, 17, 20) < 0.3, key_padding=torch.arange(20)[None] > 17
    ),
    "segments, dense and dropout": dict(
        segment_weights=torch.randn(1, 17, 1, 2),
        segment_lengths=(11, 9),
        dense=torch.randn(1, 2, 17, 20).requires_grad_(),
        dropout_p=0.2,
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_kernels_themselves(monkeypatch, name):
    """Interpreted: each is run by itself, on the shape that is forced, under the class that
    launches ask for."""
    inputs = call(17, 20, R=0 if "segments" in name else 4, dtype=torch.float32, **FEATURES[name])
    other = Config(16, 16, 4, 1)
    asked, candidates = [], tiles.candidates

    def seen(key):
        asked.append((key, candidates(key)[0]))
        return candidates(key)

    monkeypatch.setattr(tiles, "candidates", seen)
    monkeypatch.setattr(tune, "shapes_near", lambda key, config: [config, other])
    monkeypatch.setattr(tune, "pipelines", lambda config: [config])
    monkeypatch.setattr(trial, "SMALL", (19, 21))

    def timer(function, repeats):
        function()
        return [1.0 if asked[-1][1] == other else 2.0] * repeats

    report = tune.tune(inputs, timer=timer, seconds=600)
    assert {key for key, _ in asked} == {trial.class_of(inputs, kernel) for kernel in KERNELS}
    for row in report.rows:
        assert (row.tuned, row.ratio, row.skipped) == (other, 0.5, {}), row
    for kernel in KERNELS:
        assert {config for key, config in asked if key.kernel == kernel} == {other, INTERPRETED}


@pytest.mark.parametrize("pauses", [True, False])
def test_the_gpu_is_timed_behind_a_pause(monkeypatch, pauses):
    """So that launches are queued before the first of them runs."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    sleep = (lambda cycles: done.append("pause" if cycles > 0 else "")) if pauses else None
    monkeypatch.setattr(trial, "cuda_sleep", sleep)
    assert trial.cuda_times(lambda: done.append("run"), 2) == [2.0, 2.0]
    pause = ["pause"] if pauses else []
    assert done == ["run", "wait", *pause, *["event", "run", "event"] * 2, "wait"]
