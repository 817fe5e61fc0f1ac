"""A user's mistake is refused at the door, by the argument's name; it is never a fallback."""

import numpy as np
import pytest
import torch

from flashbias_patch import telemetry
from flashbias_patch.attention import dispatch, flash_bias_attention
from flashbias_patch.bias import LowRankBias, MaskBias
from tests.support.capabilities import FASTEST
from tests.support.reference import attention

F8 = getattr(torch, "float8_e4m3fn", torch.int8)
q, k = torch.zeros(2, 5, 3, 8), torch.zeros(2, 7, 3, 8)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (dict(q=None), TypeError, "q must be a Tensor"),
        (dict(q=torch.zeros(5, 8)), ValueError, "q must have shape"),
        (dict(k=torch.zeros(2, 7, 4, 8)), ValueError, "k must have shape"),
        (dict(v=torch.zeros(2, 6, 3, 8)), ValueError, "v must have shape"),
        (dict(v=k.double()), TypeError, "share a dtype"),
        (dict(q=q.long(), k=k.long(), v=k.long()), TypeError, "floating point"),
        (dict(q=q.to(F8), k=k.to(F8), v=k.to(F8)), TypeError, "q, k and v must be floating point"),
        (dict(dropout_p=1.0), ValueError, "dropout_p"),
        (dict(dropout_p="half"), ValueError, "dropout_p"),
        (dict(scale=float("nan")), ValueError, "scale must be finite"),
        (dict(scale=float("inf")), ValueError, "scale must be finite"),
        (dict(scale=torch.tensor(-float("inf"))), ValueError, "scale must be finite"),
        (dict(scale="2"), TypeError, "scale must be a number"),
        (dict(scale=True), TypeError, "scale must be a number"),
        (dict(scale=torch.ones(2)), TypeError, "scale must be a number"),
        (
            dict(scale=torch.tensor(0.5, requires_grad=True)),
            TypeError,
            "scale must be a number, .* multiply q by it",
        ),
        (dict(dtype="fp16"), TypeError, "dtype must be"),
        (dict(dtype=16), TypeError, "dtype must be"),
        (dict(dtype=torch.int32), TypeError, "dtype must be"),
        (dict(dtype=torch.complex64), TypeError, "dtype must be"),
        (dict(dtype=torch.bool), TypeError, "dtype must be"),
        (dict(bias=3), TypeError, "bias must be"),
        (
            dict(bias=LowRankBias(torch.zeros(1, 6, 1, 2), torch.zeros(1, 7, 1, 2))),
            ValueError,
            "M=5, N=7",
        ),
        (dict(bias=torch.zeros(4, 4)), ValueError, "bias of shape"),
        (dict(attn_mask=torch.zeros(5, 6)), ValueError, "attn_mask of shape"),
        (dict(attn_mask=torch.zeros(5, 7, dtype=torch.long)), TypeError, "attn_mask must be"),
        (dict(key_padding_mask=torch.zeros(2, 6)), ValueError, "key_padding_mask"),
        (
            dict(key_padding_mask=torch.zeros(2, 7, dtype=torch.int32)),
            TypeError,
            "key_padding_mask",
        ),
        (dict(backend="fastest"), ValueError, "backend must be one of"),
    ],
)
def test_mistakes(arguments, error, words):
    call = {"q": q, "k": k, "v": k, **arguments}
    with pytest.raises(error, match=words):
        flash_bias_attention(**call)
    assert not telemetry.fallbacks()


def test_no_backend_lists_every_reason():
    reason = "empty" if FASTEST == "sdpa" else "torch .* is older than 2.1"
    with pytest.raises(dispatch.NoBackendError, match=f"sdpa: {reason}"):
        flash_bias_attention(q[:, :0], k, k, backend="sdpa")


@pytest.mark.parametrize("scale", [2, torch.tensor(2.0), torch.tensor([2.0]), np.float32(2.0)])
def test_a_scale_that_is_one_number(scale):
    x = torch.randn(2, 5, 3, 8)
    assert torch.equal(
        flash_bias_attention(x, x, x, scale=scale), flash_bias_attention(x, x, x, scale=2.0)
    )


@pytest.mark.parametrize("backend", ("reference", FASTEST))
def test_the_mask_of_a_bias_and_attn_mask_both_hide(backend):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=g) for n in (5, 7, 7))
    first, second = (torch.rand(5, 7, generator=g) < 0.4 for _ in range(2))
    out = flash_bias_attention(q, k, v, MaskBias(first), attn_mask=second, backend=backend)
    exact = attention(q, k, v, mask=first | second)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
