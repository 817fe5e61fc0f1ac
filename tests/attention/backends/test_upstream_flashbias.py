"""FlashBias' own function: where it is looked for, what is asked of it, how it is called."""

from __future__ import annotations

import sys

import pytest
import torch

from flashbias_patch import settings
from flashbias_patch.attention.backends import upstream_flashbias
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.reference_attention import attend
from flashbias_patch.attention.selfcheck import problem_of
from flashbias_patch.attention.signature import signature_of
from tests.support import internals

# A stand-in with the published call shape, in plain PyTorch.
STAND_IN = """
import torch
class FlashBiasFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_bias=None, k_bias=None, mask=None, causal=False, softmax_scale=None):
        raise RuntimeError("never called here")
flash_bias_func = FlashBiasFunc.apply
"""  # noqa: E501
PLAIN = """
import torch
def flash_bias_func(q, k, v, q_bias, k_bias, mask=None, causal=False, softmax_scale=None):
    assert mask is None and causal is False
    assert q_bias.shape[:3] == q.shape[:3] and k_bias.shape[:3] == k.shape[:3]
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * softmax_scale + torch.einsum("bmhr,bnhr->bhmn", q_bias, k_bias)
    return torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v)
"""  # noqa: E501


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Write flash_bias_triton.py into a folder; nothing of it remains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upstream_flashbias, "backend", upstream_flashbias.Upstream())

    def write(folder, text=STAND_IN):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "flash_bias_triton.py").write_text(text)
        return str(tmp_path / folder)

    yield write
    sys.modules.pop("flash_bias_triton", None)


def loaded(monkeypatch, home=None, backend=None):
    if home is not None:
        monkeypatch.setenv("FLASHBIAS_HOME", home)
    if backend is not None:
        monkeypatch.setenv("FLASHBIAS_BACKEND", backend)
    settings.reload()
    return internals.load_upstream()


def test_found_in_flashbias_home(place, monkeypatch):
    assert loaded(monkeypatch, place("checkout")).unavailable() == []


def test_found_in_external_of_the_working_directory(place, monkeypatch):
    place("external/FlashBias")
    assert loaded(monkeypatch, backend="upstream").unavailable() == []


@pytest.mark.parametrize("folder, entry", [("external/FlashBias", None), (".", ""), (".", ".")])
def test_code_of_the_working_directory_runs_only_on_request(place, monkeypatch, folder, entry):
    place(folder, "raise SystemExit('executed')")
    if entry is not None:
        monkeypatch.setattr(sys, "path", [entry, *sys.path])
    (missing,) = loaded(monkeypatch).unavailable()
    assert "Set FLASHBIAS_HOME" in missing and loaded(monkeypatch, backend="auto").unavailable()
    with pytest.raises(SystemExit):
        loaded(monkeypatch, backend="upstream")


def test_found_on_sys_path(place, monkeypatch):
    monkeypatch.syspath_prepend(place("somewhere"))
    assert loaded(monkeypatch).unavailable() == []


def test_not_found_says_where_it_looked(place, monkeypatch, tmp_path):
    (missing,) = loaded(monkeypatch, str(tmp_path / "nowhere")).unavailable()
    for part in ("looked in: FLASHBIAS_HOME", "nowhere", "sys.path", "Set FLASHBIAS_HOME"):
        assert part in missing
    monkeypatch.delenv("FLASHBIAS_HOME")
    assert "FLASHBIAS_HOME (not set)" in loaded(monkeypatch).unavailable()[0]


@pytest.mark.parametrize(
    "text, part",
    (
        (
            "def flash_bias_func(q, k, v, bias): pass",
            "takes (q, k, v, bias), expected (q, k, v, q_bias",
        ),
        ("x = 1", "has no flash_bias_func"),
        ("import a_module_that_is_not_there", "does not load: ModuleNotFoundError"),
        ("def f(:", "does not load: SyntaxError"),
    ),
)
def test_another_file_of_that_name_is_rejected(place, monkeypatch, text, part):
    assert part in loaded(monkeypatch, place("checkout", text)).unavailable()[0]
    assert (
        text.startswith("x") or "flash_bias_func" in text or "flash_bias_triton" not in sys.modules
    )


def test_why_not():
    q = torch.zeros(1, 4, 2, 8)
    assert upstream_flashbias.Upstream().why_not(AttentionInputs(q, q, q)) == ["CUDA only, got cpu"]


@pytest.mark.parametrize("segments", (False, True))
def test_call_agrees_with_the_reference(place, monkeypatch, segments):
    backend = loaded(monkeypatch, place("checkout", PLAIN))
    q = torch.zeros(1, 4, 2, 8, requires_grad=True)
    made = dict(q_factor=torch.zeros(1, 4, 1, 3), k_factor=torch.zeros(1, 6, 2, 3))
    if segments:
        made.update(segment_weights=torch.zeros(1, 4, 1, 2), segment_lengths=(3, 3))
    k = torch.zeros(1, 6, 2, 8)
    inputs = problem_of(signature_of(AttentionInputs(q, k, k, scale=0.5, **made)), 3, 11, 13)
    leaf = inputs.q_factor.requires_grad_()
    assert leaf.shape[2] == 1
    out, truth = backend(inputs), attend(inputs)
    torch.testing.assert_close(out, truth)
    g = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad((o * g).sum(), leaf)[0] for o in (out, truth)))
