"""Kernels of a self-check and of the call after it, compiled by threads before any launch.

`python compiled_ahead.py` needs Triton and PyTorch, no GPU: see cached_launches.py, whose stand-in
of a driver is used. Prints the kernels' names, and in the last line "compiled N".
"""

from __future__ import annotations

import threading

import cached_launches  # sets the driver
import torch
import triton
from triton.compiler import compiler

compiled, launched = [], []
_compile = compiler.compile


def compile_noted(source, *args, **kwargs):
    compiled.append((source.fn.__name__, threading.current_thread().name))
    return _compile(source, *args, **kwargs)


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments, **options):
        launched.append(self.name)


triton.compiler.compile = compiler.compile = (
    compile_noted  # JITFunction imports it when it first runs
)
cached_launches.Driver.launcher_cls = Launcher

from flashbias_patch.attention import first_compilation, selfcheck  # noqa: E402
from flashbias_patch.attention.backends import triton_fused  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.kernels import (  # noqa: E402
    autograd,
    cached_launch,
    compile_ahead,
    launcher,
    tiles,
)
from flashbias_patch.attention.signature import signature_of  # noqa: E402

cached_launch.Launch.at = cached_launches._launch_at
cached_launch.Launch.__call__ = cached_launches._launch
compile_ahead.THREADS = 4
triton_fused.TritonFused.why_not = lambda self, inputs: []


def step(call):
    out = triton_fused.backend(call)
    out.backward(torch.empty_like(out))


def main():
    q, k, v = (torch.randn(2, L, 2, 32).half().requires_grad_() for L in (33, 200, 200))
    call = AttentionInputs(q, k, v, scale=32**-0.5)
    first_compilation.compile_kernels(triton_fused.backend, signature_of(call), call)
    names = {name for name, _ in compiled}
    assert {"forward_kernel", "rows_kernel", "keys_kernel", "queries_kernel"} <= names, names
    assert all(thread.startswith("flashbias-compile") for _, thread in compiled), compiled
    assert not launched and q.grad is None
    # private name: a script of its own, which cannot import tests/support
    kept = (launcher._forwards, launcher._backwards, autograd._forward_plans)
    working = tiles._working  # private name: as above
    assert not any(each.steps for each in kept) and not working
    count = len(compiled)
    for problem in selfcheck.problems_of(signature_of(call), False):
        inputs = selfcheck.problem_of(signature_of(call), 0, *problem)
        grad_out = torch.empty_like(inputs.q)
        selfcheck.run(triton_fused.backend, inputs, ["q", "k", "v"], grad_out)
    step(call)
    assert len(compiled) == count and len(launched) >= 8, compiled[count:]
    assert all(each.steps for each in kept)

    # After an exception, launches are launches again, compiled where they are made.
    def fails():
        raise KeyboardInterrupt

    try:
        compile_ahead.compile_ahead(fails)
    except KeyboardInterrupt:
        assert not compile_ahead.collecting.get()
    else:
        raise AssertionError("the exception is lost")
    # A kernel that does not compile raises where it is launched, not before.
    launch = cached_launch.Launch(does_not_compile, 1, (), {})
    compile_ahead.compile_ahead(lambda: launch(q))
    assert compiled[-1][0] == "does_not_compile" and launch.run is None
    del launched[:]
    try:
        launch(q)
    except triton.CompilationError:
        assert compiled[-1] == ("does_not_compile", threading.current_thread().name)
    else:
        raise AssertionError("it compiles")
    print(*sorted(names))
    print("compiled", count)


@triton.jit
def does_not_compile(pointer):
    triton.language.store(pointer, missing_name)  # noqa: F821


if __name__ == "__main__":
    main()
