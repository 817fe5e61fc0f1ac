"""What is run to have kernels compiled before a first call."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flashbias_patch.attention import first_compilation, selfcheck  # noqa: E402
from flashbias_patch.attention.backends.base import Backend  # noqa: E402
from flashbias_patch.attention.backends.reference import backend as reference  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.signature import signature_of  # noqa: E402
from flashbias_patch.bias import Grid, WindowMaskParts  # noqa: E402


class Noting(Backend):
    """Computes as the reference; notes its calls, and counts their backward passes."""

    name = "noting"

    def __init__(self, error=None):
        self.calls, self.backwards, self.error = [], 0, error

    def compile_ahead(self, run):
        run()

    def __call__(self, inputs):
        self.calls.append(inputs)
        if self.error is not None and inputs.q.shape[1] == 9:
            raise self.error
        out = reference(inputs)
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, gradient):
        self.backwards += 1


def call_of(grad=True, dropout_p=0.0, **changes):
    q, k = torch.randn(1, 9, 2, 16, requires_grad=grad), torch.randn(1, 14, 2, 16)
    return AttentionInputs(q, k, k, scale=0.25, dropout_p=dropout_p, **changes)


def lengths(backend):
    return [(inputs.q.shape[1], inputs.k.shape[1]) for inputs in backend.calls]


def compiled(call, backend):
    first_compilation.compile_kernels(backend, signature_of(call), call)
    return backend


def test_the_problems_of_the_check_and_the_call_itself():
    backend = compiled(call_of(), Noting())
    assert lengths(backend) == [selfcheck.SHORT, (9, 14)] and backend.backwards == 2
    backend = compiled(call_of(grad=False), Noting())
    assert lengths(backend) == [selfcheck.SHORT, (9, 14)] and backend.backwards == 0


def test_dropout_is_run_as_the_check_runs_it_and_draws_nothing_of_the_callers():
    call, state = call_of(dropout_p=0.1), torch.get_rng_state()
    backend = compiled(call, Noting())
    assert [inputs.dropout_p for inputs in backend.calls] == [0.0, 0.0, selfcheck.DROPOUT_P, 0.1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callers_tensors_keep_graph_and_gradient():
    call = call_of()
    backend = compiled(call, Noting())
    assert call.q.grad is None and call.q.requires_grad and not call.k.requires_grad
    own = backend.calls[-1]
    assert own.q is not call.q and own.q.data_ptr() == call.q.data_ptr()
    assert own.q.requires_grad and not own.k.requires_grad


def test_centres_of_windows_are_copied():
    """The fused backend keeps tables that it derives from them."""
    centres = torch.zeros(1, 9, 1, 3, dtype=torch.int32)
    call = call_of(window_mask=WindowMaskParts(centres, (Grid(2, 7),), (3,)))
    own = compiled(call, Noting()).calls[-1].window_mask.centres
    assert torch.equal(own, centres) and own.data_ptr() != centres.data_ptr()


def test_too_little_memory_for_the_call_is_left_to_the_call():
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert lengths(compiled(call_of(), Noting(error)))[-1] == (9, 14)
    with pytest.raises(ValueError):
        compiled(call_of(), Noting(ValueError()))


def test_a_call_with_a_subclass_is_left_to_itself():
    class Own(torch.Tensor):
        pass

    call = call_of()._replace(k=torch.randn(1, 14, 2, 16).as_subclass(Own))
    assert lengths(compiled(call, Noting())) == [selfcheck.SHORT]


def test_a_library_runs_nothing():
    call = call_of()
    first_compilation.compile_kernels(reference, signature_of(call), call)
    assert type(reference).compile_ahead is Backend.compile_ahead
