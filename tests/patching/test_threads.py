"""Threads started inside `with attention_bias(...)` have its bias; others never do."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flashbias_patch
from flashbias_patch.attention.recovery import learned
from flashbias_patch.patching import context
from tests.support import internals
from tests.support.checkpoints import KINDS

from .test_checkpoints import Inputs, assert_equal, decoder_of, gradients, loss_of, patched, run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")


class Call:
    """One decoder's forward with, and without, the bias."""

    def __init__(self):
        self.decoder, self.inputs = decoder_of(), Inputs()
        self.given = self.inputs.query, self.inputs.memory, self.inputs.memory
        self.without = self().detach()
        self.with_bias = self.decoder(*self.given, attention_bias=self.inputs.bias()).detach()
        assert (self.with_bias - self.without).abs().max() > 1e-3

    def __call__(self):
        return self.decoder(*self.given)

    def block(self):
        return flashbias_patch.attention_bias(self.inputs.bias())


def in_thread(function, start=threading.Thread):
    results = []
    thread = start(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


class OwnThread(threading.Thread):
    def run(self):
        super().run()


@pytest.mark.parametrize(
    "start",
    (threading.Thread, OwnThread, lambda target: threading.Timer(0.0, target)),
    ids=("Thread", "a subclass", "Timer"),
)
def test_a_thread_started_in_the_block_has_the_bias(patched, start):  # noqa: F811
    call = Call()
    with call.block():
        torch.testing.assert_close(in_thread(call, start), call.with_bias)
        torch.testing.assert_close(
            in_thread(lambda: in_thread(call)), call.with_bias
        )  # and one that it starts
    torch.testing.assert_close(in_thread(call, start), call.without)


def test_other_threads_do_not_have_it(patched):  # noqa: F811
    call, opened, done, found = Call(), threading.Event(), threading.Event(), []

    def work():  # started before the block, runs while it is open, and starts threads of its own
        opened.wait()
        found.extend([call(), in_thread(call)])
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(call).result())
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with call.block():
        opened.set()
        done.wait()
    thread.join()
    for out in found:
        torch.testing.assert_close(out, call.without)


def test_a_thread_that_outlasts_the_block_has_no_bias(patched):  # noqa: F811
    call, closed, found = Call(), threading.Event(), []

    def work():
        found.append(call())
        started.set()
        closed.wait()
        found.append(call())

    started = threading.Event()
    with call.block():
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
    closed.set()
    thread.join()
    torch.testing.assert_close(found[0], call.with_bias)
    torch.testing.assert_close(found[1], call.without)


def test_a_pool_has_the_bias_of_the_submitting_thread(patched):  # noqa: F811
    call = Call()
    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(
            pool.submit(call).result(), call.without
        )  # the worker exists before the block
        with call.block():
            torch.testing.assert_close(pool.submit(call).result(), call.with_bias)
            torch.testing.assert_close(
                list(pool.map(lambda _: call(), range(2)))[1], call.with_bias
            )
        torch.testing.assert_close(pool.submit(call).result(), call.without)
    with ThreadPoolExecutor(1) as pool:
        with call.block():
            pool.submit(int).result()  # the worker is started in the block
        torch.testing.assert_close(pool.submit(call).result(), call.without)


def test_many_threads_with_biases_of_their_own(patched):  # noqa: F811
    calls = [Call() for _ in range(2)]
    scales, found = [0.5, 1.0, 2.0, 4.0], {}
    with torch.no_grad():
        expected = {
            (i, scale): call.decoder(*call.given, attention_bias=call.inputs.bias() * scale)
            for i, call in enumerate(calls)
            for scale in scales
        }

    def work(i, scale):
        with torch.no_grad():
            for _ in range(5):
                with flashbias_patch.attention_bias(calls[i].inputs.bias() * scale):
                    found[i, scale] = in_thread(torch.no_grad()(calls[i]))

    threads = [threading.Thread(target=work, args=case) for case in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case, out in expected.items():
        torch.testing.assert_close(found[case], out)


def test_each_thread_counts_its_own_layers(patched):  # noqa: F811
    """As nn.DataParallel's replicas, whose modules are copies."""
    import copy

    call = Call()
    replicas = [copy.deepcopy(call.decoder) for _ in range(3)]
    with flashbias_patch.attention_bias(call.inputs.bias(), layers=[0]):
        here = call()
        for replica in replicas:
            torch.testing.assert_close(
                in_thread(lambda replica=replica: replica(*call.given)), here
            )
    assert (here - call.without).abs().max() > 1e-3 and (here - call.with_bias).abs().max() > 1e-3


@pytest.mark.parametrize(
    "kind", [kind for kind in ("reentrant", "non-reentrant", "fairscale", "hooks") if kind in KINDS]
)
@pytest.mark.parametrize("backward_in", ("main", "thread", "another thread"))
def test_checkpoints_in_threads(patched, kind, backward_in):  # noqa: F811
    results = []
    for around in (None, kind):
        decoder, inputs = decoder_of("layer", around), Inputs("shared")

        def forward(decoder=decoder, inputs=inputs):
            out = decoder(inputs.query, inputs.memory, inputs.memory)
            if backward_in == "thread":
                loss_of(out, 0).backward()
            return out

        with flashbias_patch.attention_bias(inputs.bias()):
            out = in_thread(forward)
        if backward_in == "main":
            loss_of(out, 0).backward()
        if backward_in == "another thread":
            in_thread(lambda out=out: loss_of(out, 0).backward())
        results.append(gradients(decoder, inputs))
    assert_equal(results[1], results[0])


@pytest.mark.gpu
def test_data_parallel(patched):  # noqa: F811
    call = Call()
    model = torch.nn.DataParallel(
        call.decoder.cuda(), [0] if torch.cuda.device_count() == 1 else [0, 1], dim=1
    )
    given = [tensor.detach().cuda() for tensor in call.given]
    with call.block():
        torch.testing.assert_close(model(*given).cpu(), call.with_bias)
    torch.testing.assert_close(model(*given).cpu(), call.without)


def test_what_others_wrap_meanwhile_stays(patched, monkeypatch):  # noqa: F811
    call, seen = Call(), []
    monkeypatch.setattr(
        threading.Thread, "start", threading.Thread.start
    )  # put back after the test
    with call.block():
        ours = threading.Thread.start

        def theirs(self):
            seen.append(self)
            return ours(self)

        threading.Thread.start = theirs
        torch.testing.assert_close(in_thread(call), call.with_bias)
    assert threading.Thread.start is theirs
    torch.testing.assert_close(in_thread(call), call.without)
    with call.block():
        torch.testing.assert_close(in_thread(call), call.with_bias)
    torch.testing.assert_close(in_thread(call), call.without)
    assert len(seen) == 4


# -- blocks in generators: they end in another order than they began in, or in another thread ------


def generated(call, factor):
    with flashbias_patch.attention_bias(call.inputs.bias() * factor):
        while True:
            yield call()


@pytest.mark.parametrize("around", (False, True), ids=("alone", "in a block"))
@pytest.mark.parametrize("first", (0, 1))
def test_interleaved_blocks_end_only_themselves(patched, first, around):  # noqa: F811
    call = Call()
    outer = flashbias_patch.attention_bias(call.inputs.bias() * 0.5)
    if around:
        outer.__enter__()
    expected = call()
    blocks = generated(call, 1.0), generated(call, -2.0)
    for block in blocks:
        next(block)
    blocks[first].close()
    with flashbias_patch.attention_bias(call.inputs.bias() * (1.0, -2.0)[first]):
        everything = call()
    blocks[1 - first].close()
    torch.testing.assert_close(call(), expected)
    with flashbias_patch.attention_bias(call.inputs.bias() * -1.0):
        torch.testing.assert_close(call(), everything)  # the one that was left had been in force
    if around:
        outer.__exit__(None, None, None)
    torch.testing.assert_close(call(), call.without)


def test_a_block_that_ends_in_another_thread(patched):  # noqa: F811
    call = Call()
    block = generated(call, 1.0)
    torch.testing.assert_close(next(block), call.with_bias)
    in_thread(block.close)
    torch.testing.assert_close(call(), call.without)
    assert not context.active()  # later calls do not look for a bias
    with call.block():
        torch.testing.assert_close(call(), call.with_bias)


def test_a_block_that_ends_in_another_task(patched):  # noqa: F811
    call = Call()

    async def block():
        with call.block():
            while True:
                yield call()

    async def use():
        opened = block()
        torch.testing.assert_close(await opened.__anext__(), call.with_bias)
        await asyncio.create_task(opened.aclose())
        torch.testing.assert_close(call(), call.without)
        assert not context.active()

    asyncio.run(use())
    torch.testing.assert_close(call(), call.without)


@pytest.mark.parametrize("kind", ("fairscale", "non-reentrant", "hooks"))
def test_a_recomputation_after_a_block_that_ended_in_another_thread(patched, kind):  # noqa: F811
    results = []
    for around in (None, kind):
        inputs = Inputs("shared")
        decoder = decoder_of() if around is None else decoder_of("layer", kind)

        def block(inputs=inputs, decoder=decoder):
            with flashbias_patch.attention_bias(inputs.bias()):
                yield decoder(inputs.query, inputs.memory, inputs.memory)

        opened = block()
        out = next(opened)
        in_thread(opened.close)
        results.append(gradients(decoder, inputs, out))
    assert_equal(results[1], results[0])


def test_parts_of_a_learned_gradient_from_two_threads_of_one_pass():
    """Each GPU of a backward pass has a thread: what another one adds during an addition must not
    be lost."""
    one_pass, tensor, others = learned.PassGradients(), object(), []

    class Part:
        def __init__(self, number):
            self.number = number

        def __add__(self, other):
            if not others:
                others.append(threading.Thread(target=one_pass.add, args=(tensor, Part(4))))
                others[0].start()
                others[0].join(0.2)  # it ends here only if nothing keeps it out
            return Part(self.number + other.number)

    internals.pending_gradients(one_pass)[id(tensor)] = tensor, Part(1)
    one_pass.add(tensor, Part(2))
    others[0].join()
    assert internals.pending_gradients(one_pass)[id(tensor)][1].number == 7
