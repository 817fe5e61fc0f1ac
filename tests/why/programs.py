"""Small training programs, one for each cause. MODEL is common; each program is a change of it."""

from __future__ import annotations

MODEL = '''
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)


class Attention(nn.Module):
    def forward(self, query, key, bias=None):
        scores = query @ key.transpose(-1, -2) / 4
        return ((scores if bias is None else scores + bias).softmax(-1) @ key)


class FlashAttention(nn.Module):
    """Drops its bias, as the family's flash classes do."""

    def forward(self, query, key, bias=None):
        return (query @ key.transpose(-1, -2) / 4).softmax(-1) @ key


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, weights):
        return self.bias_scale * weights


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.router = Router()
        self.attention = Attention()
        self.weights = torch.randn(5, 7)

    def forward(self, x):
        query, key = self.proj(x[:5]), self.proj(x[5:])
        return self.attention(query, key, bias=self.router(self.weights))


model = Model()
LR = 0.1


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


def loss_of(out):
    return out.square().sum()


def train(model, steps=8, after=lambda: None, optimizer=None):
    optimizer = optimizer or optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(torch.randn(12, 8))).backward()
        optimizer.step()
        after()
'''

# name -> (program after MODEL, expected cause or None, words that the finding must hold)
PROGRAMS = {
    "learns": ("train(model)", None, "it learns"),
    "missing": (
        "del model.router.bias_scale\nmodel.router.bias_scal = nn.Parameter(torch.tensor(1.0))\n"
        "model.router.forward = lambda w: model.router.bias_scal * w\ntrain(model)",
        "missing",
        "bias_scal",
    ),
    "switched off": (
        "class Off(nn.Module):\n    enable_aqr = False\n    def __init__(self):\n        "
        "super().__init__()\n"
        "        self.enable_aqr = False\n    def forward(self, w):\n        return w\n"
        "model.router = Off()\ntrain(model)",
        "switched off",
        "enable_aqr is False",
    ),
    "buffer": (
        "del model.router.bias_scale\nmodel.router.register_buffer('bias_scale', "
        "torch.tensor(1.0))\ntrain(model)",
        "not a parameter",
        "a buffer",
    ),
    "plain number": (
        "del model.router.bias_scale\nmodel.router.bias_scale = "
        "1.0\nmodel.router.learnable_scale = False\n"
        "train(model)",
        "not a parameter",
        "learnable_scale is False",
    ),
    "frozen": ("model.router.requires_grad_(False)\ntrain(model)", "frozen", "frozen"),
    "not held": (
        "train(model, optimizer=torch.optim.SGD(model.proj.parameters(), lr=LR))",
        "not held",
        "does not hold",
    ),
    "replaced": (
        "optimizer = optimizer_of(model)\nmodel.router.bias_scale = "
        "nn.Parameter(torch.tensor(2.0))\n"
        "train(model, optimizer=optimizer)",
        "replaced",
        "Router",
    ),
    "lr 0": (
        "train(model, optimizer=torch.optim.SGD([{'params': model.proj.parameters()}, "
        "{'params': model.router.parameters(), 'lr': 0.0}], lr=LR))",
        "lr 0",
        "learning rate is 0",
    ),
    "unused": (
        "model.forward = lambda x: model.proj(x)\ntrain(model)",
        "unused",
        "Router, was never called",
    ),
    "detached": (
        "model.router.forward = lambda w: model.router.bias_scale.detach() * w\ntrain(model)",
        "detached",
        "detach",
    ),
    "data": (
        "model.router.forward = lambda w: model.router.bias_scale.data * w\ntrain(model)",
        "detached",
        "data",
    ),
    "item": (
        "model.router.forward = lambda w: model.router.bias_scale.item() * w\ntrain(model)",
        "detached",
        "item",
    ),
    "no_grad": (
        "def forward(w):\n    with torch.no_grad():\n        return model.router.bias_scale * w\n"
        "model.router.forward = forward\ntrain(model)",
        "no_grad",
        "mul",
    ),
    "argmax": (
        "model.router.forward = lambda w: torch.argmax(model.router.bias_scale * w, -1, "
        "keepdim=True).float()\n"
        "train(model)",
        "not differentiable",
        "argmax",
    ),
    "dropped": ("model.attention = FlashAttention()\ntrain(model)", "dropped", "FlashAttention"),
    "not in loss": (
        "class Aside(Model):\n    def forward(self, x):\n        self.kept = "
        "self.router(self.weights) + 1\n"
        "        return self.proj(x)\nmodel = Aside()\ntrain(model)",
        "not in loss",
        "add",
    ),
    "clamped": (
        "nn.init.constant_(model.router.bias_scale, 5.5)\n"
        "model.router.forward = lambda w: torch.clamp(model.router.bias_scale, 0.5, 5.0) * "
        "w\ntrain(model)",
        "clamped",
        "clamp(0.5, 5)",
    ),
    "masked": (
        "model.router.forward = lambda w: (model.router.bias_scale * "
        "w).masked_fill(torch.ones(5, 7).bool(), 0.0)\n"
        "train(model)",
        "masked",
        "masked_fill",
    ),
    "times zero": ("model.weights = torch.zeros(5, 7)\ntrain(model)", "times zero", "mul"),
    "cancels": (
        "model.weights = torch.randn(5, 1).expand(5, 7)\ntrain(model)",
        "cancels",
        "softmax ignores",
    ),
    "loss weight 0": (
        "loss_of = lambda out: out.square().sum() * 0.0\ntrain(model)",
        "times zero",
        "mul(0)",
    ),
    "nothing matched": (
        "loss_of = lambda out: out[out.abs() > 1e9].sum()\ntrain(model)",
        "nothing matched",
        "sum",
    ),
    "mean of nothing": (
        "loss_of = lambda out: out[out.abs() > 1e9].mean()\ntrain(model)",
        "nothing matched",
        "mean",
    ),
    "relu beyond": (
        "nn.init.constant_(model.router.bias_scale, -5.0)\n"
        "model.router.forward = lambda w: F.relu(model.router.bias_scale) * w\ntrain(model)",
        "clamped",
        "relu",
    ),
    "no gradient": (
        "class Silent(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x, "
        "w):\n        return x * w\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        return None, grad\n"
        "model.router.forward = lambda w: Silent.apply(model.router.bias_scale * 1.0, "
        "model.proj.weight[:5, :7])\n"
        "train(model)",
        "no gradient",
        "Silent",
    ),
    "adamw": (
        "train(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))",
        None,
        "it learns",
    ),
    "grown past its bound": (
        "model.forward = lambda x: model.proj(x).sum() - torch.clamp(model.router.bias_scale, "
        "0.5, 1.2)\n"
        "loss_of = lambda out: out\ntrain(model, steps=20)",
        "clamped",
        "clamp",
    ),
    "saturated": ("model.weights = torch.eye(5, 7) * 1e4\ntrain(model)", "saturated", "softmax"),
    "gradient scaler": (
        "class Inf(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n      "
        "  return x * 1\n"
        "    @staticmethod\n    def backward(ctx, grad):\n        return grad * float('inf')\n"
        "scaler, optimizer = torch.amp.GradScaler('cpu'), optimizer_of(model)\nfor _ in range(8):\n"
        "    scaler.scale(Inf.apply(loss_of(model(torch.randn(12, 8))))).backward()\n"
        "    scaler.step(optimizer)\n    scaler.update()\n    optimizer.zero_grad()",
        "skipped",
        "GradScaler",
    ),
    "underflow": (
        "model.router.forward = lambda w: (model.router.bias_scale.half() * w.half()).float()\n"
        "loss_of = lambda out: out.square().sum() * 1e-10\ntrain(model)",
        "underflow",
        "float16",
    ),
    "not finite": (
        "loss_of = lambda out: (out - out).abs().sqrt().sum()\ntrain(model)",
        "not finite",
        "step 1",
    ),
    "cleared": (
        "optimizer = optimizer_of(model)\nfor _ in range(8):\n    loss_of(model(torch.randn(12, "
        "8))).backward()\n"
        "    optimizer.zero_grad()\n    optimizer.step()",
        "cleared",
        "has none",
    ),
    "too small": ("LR = 1e-12\ntrain(model)", "too small", "spacing"),
    "half parameter": (
        "model.router.bias_scale.data = model.router.bias_scale.data.half()\n"
        "LR = 1e-6\ntrain(model)",
        "too small",
        "float16",
    ),
    "printed digits": (
        "LR = 1e-7\nnn.init.constant_(model.router.bias_scale, 1.00002)\ntrain(model)",
        None,
        "printed digits",
    ),
    "set back": (
        "def after():\n    with torch.no_grad():\n        model.router.bias_scale.clamp_(1.0, "
        "1.0)\n"
        "train(model, after=after)",
        "set back",
        "clamp",
    ),
    "ema": (
        "import copy\nema = copy.deepcopy(model)\ndef after():\n    for p, e in "
        "zip(model.parameters(), ema.parameters()):\n"
        "        e.data.mul_(0.9).add_(p.data, alpha=0.1)\n        "
        "p.data.copy_(e.data)\ntrain(model, after=after)",
        "overwritten",
        "copy",
    ),
    "initialised again": (
        "train(model, after=lambda: nn.init.constant_(model.router.bias_scale, 1.0))",
        "set back",
        "constant",
    ),
    "checkpoint in between": (
        "state = model.state_dict()\nstate = {k: v.clone() + 1 for k, v in state.items()}\n"
        "train(model, after=lambda: model.load_state_dict(state))",
        "overwritten",
        "copy",
    ),
    "loaded": (
        "model.load_state_dict({**model.state_dict(), 'router.bias_scale': "
        "torch.tensor(0.25)})\ntrain(model)",
        None,
        "1 -> 0.25",
    ),
    "reentrant": (
        "class Checkpointed(Model):\n    def forward(self, x):\n        query, key = "
        "self.proj(x[:5]), self.proj(x[5:])\n"
        "        self.bias = self.router(self.weights)\n        run = lambda q, k: "
        "self.attention(q, k) if self.bias is "
        "None else self.attention(q, k, self.bias)\n        out = checkpoint(run, query, key, "
        "use_reentrant=True)\n"
        "        self.bias = None\n        return out\nmodel = Checkpointed()\ntrain(model)",
        "reentrant",
        "checkpoint",
    ),
    "log only": (
        "class Logged(Model):\n    def forward(self, x):\n        out = super().forward(x)\n"
        "        self.log = self.router.bias_scale.item()\n        return out\nmodel = "
        "Logged()\ntrain(model)",
        None,
        "it learns",
    ),
    "no step": (
        "for _ in range(3):\n    loss_of(model(torch.randn(12, 8))).backward()",
        "no step",
        "no optimizer",
    ),
}
