"""The distributed benchmark's batches and its sharded part, and the launcher, on two processes of
the CPU."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--device",
    "cpu",
    "--queries",
    "40",
    "--bev",
    "12",
    "--image-size",
    "128x64",
    "--dropout",
    "0",
    "--no-cp",
]


@pytest.fixture
def environment():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return {
        **os.environ,
        "PORT": str(port),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ranks

    return ranks


def test_points_turn_as_boxes_do(ranks):
    points = torch.tensor([[1.0, 0.0, 2.0, 0.5, 0.1], [0.0, 3.0, -1.0, 0.25, 0.0]])
    quarter = ranks.turned(points, math.pi / 2)
    expected = torch.tensor([[0.0, 1.0, 2.0, 0.5, 0.1], [-3.0, 0.0, -1.0, 0.25, 0.0]])
    torch.testing.assert_close(quarter, expected, atol=1e-6, rtol=0)
    assert points[0, 0] == 1.0  # the given points stay


def test_a_full_voxel_keeps_its_first_points(ranks):
    voxels = ranks.detectors.Voxels((-1.0, -1.0, -1.0), (0.5, 0.5, 1.0), 2)
    g = torch.Generator().manual_seed(3)
    points = torch.rand(200, 5, generator=g) * 2 - 1
    thin = ranks.detectors.thinned(points, voxels)
    expected, count = [], {}
    for point in points:
        cell = tuple(((point[:3] + 1) / torch.tensor([0.5, 0.5, 1.0])).floor().tolist())
        count[cell] = count.get(cell, 0) + 1
        if count[cell] <= 2:
            expected.append(point)
    assert torch.equal(thin, torch.stack(expected)) and len(thin) < 70
    assert torch.equal(ranks.detectors.thinned(thin, voxels), thin)


def test_a_held_lidar_branch_is_not_trained(ranks):
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lidar, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

        def extract_pts_feat(self, points, image_features, metas):
            return [self.lidar(points)]

        def forward(self, return_loss, points, img_metas):
            return {"loss": self.head(self.extract_pts_feat(points, None, img_metas)[0]).sum()}

    net, batch = Detector(), {"points": torch.randn(2, 3), "img_metas": []}
    features = ranks.detectors.lidar_features(net, batch)
    assert not features[0].requires_grad
    before = ranks.loss_of(net, batch)
    (held,) = ranks.detectors.hold_lidar(net, features)
    loss = ranks.loss_of(net, {**batch, "points": None})
    assert loss == before
    loss.backward()
    assert net.lidar.weight.grad is None
    torch.testing.assert_close(held.grad, net.head.weight.expand(2, 4))


class Normalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lidar, self.image = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm2d(3)
        self.image.eval()  # as a backbone with norm_eval

    def forward(self, return_loss, x):
        return {"loss": (self.lidar(x) * x).sum(), "accuracy": x.sum()}


def test_a_part_of_a_batch_has_the_whole_batch_gradient(ranks):
    torch.manual_seed(0)
    net, whole = Normalised(), torch.randn(8, 3) * 2 + 1
    image = {name: value.clone() for name, value in net.image.state_dict().items()}
    ranks.freeze_statistics(net, {"x": whole})
    torch.testing.assert_close(net.lidar.running_mean, whole.mean(0))
    torch.testing.assert_close(net.lidar.running_var, whole.var(0))
    assert all(torch.equal(image[name], value) for name, value in net.image.state_dict().items())

    def gradient(x):
        net.zero_grad()
        ranks.loss_of(net, {"x": x}).backward()
        return ranks.gradient(net)

    parts = gradient(whole[:3]) + gradient(whole[3:])
    torch.testing.assert_close(parts, gradient(whole), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="fully_shard is newer"
)
def test_sharded_training_is_the_unsharded_one(environment, tmp_path):
    out = tmp_path / "fsdp.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            environment["PORT"],
            str(ROOT / "benchmarks" / "distributed.py"),
            "fsdp",
            "--device",
            "cpu",
            "--tiny",
            "--out",
            str(out),
        ],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads(out.read_text())["fsdp"]
    assert found["patched"]["calls"] and not found["unpatched"]["calls"]
    for name in ("patched", "unpatched"):
        assert found[name]["loss_difference"] < 1e-5 and found[name]["weights"] < 1e-6
    assert (
        len(found["losses_ddp_unpatched"]) == 2
        and found["losses_ddp_unpatched"][0] != found["losses_ddp_unpatched"][1]
    )


def losses_of(words, environment):
    """(losses of rank 0, what was logged)"""
    done = subprocess.run(words, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        float(line.split("loss: ")[1].split()[0])
        for line in done.stdout.splitlines()
        if line.startswith("step")
    ], done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_shell_launcher_runs_patched(environment):
    script = [
        "bash",
        str(ROOT / "examples" / "mini_cmt" / "tools" / "dist_train.sh"),
        "mini",
        "2",
        "--steps",
        "2",
        *SMALL,
    ]
    flashbias = [
        sys.executable,
        "-c",
        "import sys; from flashbias_patch.cli.main import main; sys.exit(main())",
        "run",
    ]
    said = {**environment, "FLASHBIAS_LOG_LEVEL": "info"}
    unpatched, _ = losses_of([*flashbias, "--off", "--", *script], said)
    patched, log = losses_of([*flashbias, "--", *script], said)
    assert len(patched) == 2 and patched == pytest.approx(unpatched, rel=1e-4)
    assert "patched" in log  # the ranks say what they patched


def test_the_launcher_says_how_it_is_used(environment):
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "mini_cmt" / "tools" / "dist_train.sh")],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 2 and "PRESET PROCESSES" in done.stderr
