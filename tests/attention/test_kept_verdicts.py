"""Verdicts of self-checks on disk: kept, used by the next process, removed after a failure, and
never trusted blindly."""

from __future__ import annotations

import json
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from flashbias_patch import settings
from flashbias_patch.attention import dispatch, kept_verdicts, selfcheck, signature
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.cli import doctor

SDPA = "sdpa"


def call():
    q = torch.randn(1, 5, 2, 8)
    return AttentionInputs(q, q, q, scale=0.5)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Verdicts of classes on the CPU are kept, in a file of the test's own; what was checked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FLASHBIAS_VERDICTS", "on")
    settings.reload()
    monkeypatch.setattr(
        kept_verdicts, "wanted", lambda backend, key, name: settings.current().verdicts
    )
    monkeypatch.setattr(kept_verdicts, "here", lambda device: "a GPU")
    kept_verdicts.reset()
    checked, real = [], selfcheck.check
    monkeypatch.setattr(
        selfcheck, "check", lambda b, *given: checked.append(b.name) or real(b, *given)
    )
    yield checked
    kept_verdicts.reset()


def another_process():
    dispatch.reset()
    kept_verdicts.reset()


def test_the_next_process_does_not_check_again(kept):
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA]
    (row,) = kept_verdicts.rows()
    assert (
        row["backend"] == SDPA
        and row["problems"]
        and 0 <= row["worst"] <= 1
        and row["seconds"] >= 0
    )
    another_process()
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA]
    settings.reload({"FLASHBIAS_VERDICTS": "off"})
    another_process()
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] * 2


def test_another_machine_checks(kept, monkeypatch):
    dispatch.attend(call(), SDPA)
    another_process()
    monkeypatch.setattr(kept_verdicts, "here", lambda device: "another GPU")
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] * 2 and len(kept_verdicts.rows()) == 2


def test_unlike_gpus_of_one_process_are_kept_apart(kept, monkeypatch):
    monkeypatch.setattr(kept_verdicts, "here", lambda device: f"GPU {device.index}")
    key = signature.signature_of(call())
    first, second = (key._replace(device=torch.device("cuda", index)) for index in range(2))
    kept_verdicts.keep(first, SDPA, {"worst": 0.5})
    for _ in range(2):
        assert kept_verdicts.holds(first, SDPA) and not kept_verdicts.holds(second, SDPA)
        kept_verdicts.reset()
    kept_verdicts.holds(second, SDPA)
    kept_verdicts.forget(second, SDPA)
    assert kept_verdicts.holds(first, SDPA)
    kept_verdicts.keep(second, SDPA, {"worst": 0.5})
    kept_verdicts.forget(first, SDPA)
    assert kept_verdicts.holds(second, SDPA) and not kept_verdicts.holds(first, SDPA)
    assert [row["place"] for row in kept_verdicts.rows()] == ["GPU 1"]


def test_another_cudnn_is_another_place(monkeypatch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    places = set()
    for version in (90100, 91002):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        places.add(kept_verdicts.here(torch.device("cuda", 0)))

    def refused():
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", refused)
    places.add(kept_verdicts.here(torch.device("cuda", 0)))
    assert len(places) == 3


def test_without_a_home_nothing_is_written(kept, monkeypatch, tmp_path):
    """Not into a directory named "~" where the process happens to run."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] and kept_verdicts.rows() == [] and os.listdir(tmp_path) == []


def test_a_failure_removes_the_verdict(kept):
    dispatch.attend(call(), SDPA)
    key = signature.signature_of(call())
    dispatch.breakers.open(key, SDPA, "it failed")
    assert kept_verdicts.rows() == []
    another_process()
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] * 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", '{"place": 1}', '[{"place": "a GPU"}]', "\x00\xff" * 40, "[" * 10**5],
)
def test_a_damaged_file_counts_as_empty(kept, text):
    os.makedirs(os.path.dirname(kept_verdicts.path()), exist_ok=True)
    with open(kept_verdicts.path(), "w", encoding="latin-1") as file:
        file.write(text)
    assert kept_verdicts.rows() == []
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] and len(kept_verdicts.rows()) == 1


def test_a_file_of_another_user_counts_as_empty(kept, monkeypatch):
    dispatch.attend(call(), SDPA)
    monkeypatch.setattr(
        os, "getuid", lambda: os.stat(kept_verdicts.path()).st_uid + 1, raising=False
    )
    monkeypatch.setattr(
        os, "fstat", lambda handle: os.stat_result((0, 0, 0, 0, 12345, 0, 0, 0, 0, 0))
    )
    assert kept_verdicts.rows() == []


def test_a_directory_that_cannot_be_written_costs_a_check_and_nothing_else(
    kept, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dispatch.attend(call(), SDPA)
    assert kept == [SDPA] and kept_verdicts.rows() == []


def _keep_some(directory, number):
    os.environ["XDG_CACHE_HOME"] = directory
    kept_verdicts.here = lambda device: "a GPU"
    key = signature.signature_of(call())
    for size in range(5):
        one = key._replace(head_dim=8 * size, value_head_dim=number)
        kept_verdicts.keep(one, SDPA, {"worst": 0.5})


def test_several_processes_write_at_once(kept, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_keep_some, args=(str(tmp_path), number)) for number in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert len(kept_verdicts.rows()) == 15
    assert not [name for name in os.listdir(tmp_path / "flashbias_patch") if name.startswith("tmp")]


def test_only_a_gpu_and_this_packages_backends():
    settings.reload({"FLASHBIAS_VERDICTS": "on"})
    key = signature.signature_of(call())
    cuda = key._replace(device=torch.device("cuda", 0))
    sdpa = dispatch.backend(SDPA)
    assert kept_verdicts.wanted(sdpa, cuda, SDPA)
    assert not kept_verdicts.wanted(sdpa, key, SDPA)
    assert not kept_verdicts.wanted(object(), cuda, SDPA)
    assert not kept_verdicts.wanted(sdpa, cuda, "upstream")


def test_doctor_shows_them(kept, capsys):
    dispatch.attend(call(), SDPA)
    report = doctor.examine()
    assert json.loads(json.dumps(report))["self_checks"]["rows"][0]["backend"] == SDPA
    (line,) = [
        line
        for line in doctor.as_text(report).splitlines()
        if line.startswith("  sdpa") and "a GPU" in line
    ]
    assert "cpu float32 D8" in line and "of the tolerance" in line
