"""The environment files: their versions agree, and every pip step that needs no compiler is
resolved."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.scripts import ROOT

FOLDER = ROOT / "environments"


def pins(text):
    """name -> version of every `name==version`."""
    return dict(re.findall(r"([A-Za-z][\w.-]*)==(\d[\w.]*)", text))


def test_versions_are_those_that_the_tests_run_with():
    tested = pins((ROOT / "tools" / "openmmlab_env.sh").read_text())
    wanted = pins((FOLDER / "mmdet3d-v1.sh").read_text())
    assert {"torch", "triton", "mmcv-full", "mmdet", "mmdet3d", "numpy"} <= set(wanted)
    assert {name: version for name, version in wanted.items() if name != "torch"} == {
        name: tested[name] for name in wanted if name != "torch"
    }
    assert (
        f"TORCH21=(torch=={wanted['torch']})" in (ROOT / "tools" / "openmmlab_env.sh").read_text()
    )


def test_dockerfile_and_conda_use_the_script():
    docker = (ROOT / "Dockerfile").read_text()
    assert (
        "environments/mmdet3d-v1.sh" in docker and "python3.10" in docker and "cuda:12.1" in docker
    )
    for name in ("mmdet3d-v1", "mmengine"):
        script = FOLDER / f"{name}.sh"
        assert script.stat().st_mode & stat.S_IXUSR
        assert f"environments/{name}.sh" in (FOLDER / f"{name}.yml").read_text()
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def interpreter(version):
    """A Python of this version; None if there is none."""
    folders = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))
    for name in [shutil.which(f"python{version}"), *(str(folder / "python") for folder in folders)]:
        if (
            name
            and subprocess.run([name, "-m", "pip", "--version"], capture_output=True).returncode
            == 0
        ):
            return name
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name, version", [("mmdet3d-v1", "3.10"), ("mmengine", "3.11"), ("benchmarks", "3.12")]
)
def test_pip_steps_are_resolved(tmp_path, name, version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} with pip")
    if subprocess.run(
        [
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(tmp_path / "probe"),
            "wrapt",
        ],
        capture_output=True,
    ).returncode:
        pytest.skip("no package index can be reached")
    pip = tmp_path / "pip"  # each step resolves what it names, and installs nothing
    pip.write_text(
        f'#!/bin/sh\nverb=$1; shift\nexec {python} -m pip "$verb" --dry-run --no-deps "$@"\n'
    )
    pip.chmod(0o755)
    done = subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh")],
        text=True,
        capture_output=True,
        env={**os.environ, "PIP": str(pip), "WHEELS_ONLY": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = done.stdout.count("Would install")
    assert steps >= {"mmdet3d-v1": 8, "mmengine": 3, "benchmarks": 5}[name], done.stdout
