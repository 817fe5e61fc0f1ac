"""`flashbias doctor`: the machine, Markdown for an issue, and names that FLASHBIAS_TARGETS leaves
out."""

from __future__ import annotations

import argparse
import json

import pytest

from flashbias_patch import driver, environment, settings
from flashbias_patch.cli import doctor, system


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.main(parser.parse_args(list(words))) == 0
    return capsys.readouterr().out


def test_markdown_is_folded_and_shows_no_path(capsys, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_HOME", "/somewhere/private")
    monkeypatch.setenv("FLASHBIAS_DTYPE", "fp16")
    settings.reload()
    page = run(capsys, "--markdown")
    assert page.startswith("<details>") and page.rstrip().endswith("</details>")
    assert (
        "| FLASHBIAS_DTYPE | fp16 |" in page
        and "| FLASHBIAS_HOME | set |" in page
        and "private" not in page
    )
    assert (
        "| OS | " in page
        and "| torch | " in page
        and "| reference | supported |" in page
        and "| mmcv | " not in page
    )


def test_text_is_aligned_and_has_the_words_of_the_readme(capsys, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PATCH", "1")
    monkeypatch.setenv("FLASHBIAS_RANK", "1")  # equal to True, and not "on"
    settings.reload()
    page = run(capsys)
    rows = dict(line.split() for line in page.splitlines() if line.startswith("  FLASHBIAS_"))
    assert {
        name: rows[f"FLASHBIAS_{name}"]
        for name in ("PATCH", "STRICT", "TARGETS", "HOME", "COMPAT", "RANK")
    } == dict(PATCH="on", STRICT="off", TARGETS="all", HOME="unset", COMPAT="all", RANK="1")
    packages = page.partition("packages:\n")[2].partition("settings:")[0].splitlines()
    (column,) = {line.index(line.split()[1], 2 + len(line.split()[0])) for line in packages}
    assert column > len("  nuscenes-devkit")


def test_json_has_the_machine(capsys):
    report = json.loads(run(capsys, "--json"))
    assert set(report["system"]) == set(doctor.SYSTEM) and report["system"]["numpy_abi"] == "ok"
    assert {"torchvision", "spconv", "nuscenes-devkit", "numpy"} <= set(report["packages"])


@pytest.mark.parametrize(
    "number, version", [(8902, (8, 9, 2)), (91002, (9, 10, 2)), (7605, (7, 6, 5))]
)
def test_cudnn_version(number, version):
    assert system.cudnn_version(number) == version


def test_driver(tmp_path, monkeypatch):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n"
    )
    monkeypatch.setattr(driver, "FILE", str(tmp_path / "version"))
    assert system.driver_version() == "535.104.05"


@pytest.mark.parametrize("value, left_out", [
    ("-FlashMHA", {"FlashMHA"}), ("FlashMHA", {"CmtHead", "PETRMultiheadAttention"}), ("", set()),
    ("PETRMultiheadAttention,FlashMHA,-FlashMHA", {"FlashMHA", "CmtHead"}),
])  # fmt: skip
def test_targets_can_be_left_out(monkeypatch, value, left_out):
    monkeypatch.setenv("FLASHBIAS_TARGETS", value)
    read = settings.reload()
    assert {
        name for name in ("FlashMHA", "CmtHead", "PETRMultiheadAttention") if read.leaves_out(name)
    } == left_out
    assert not environment.problems()


def test_a_misspelt_name_to_leave_out_is_named(monkeypatch):
    monkeypatch.setenv("FLASHBIAS_TARGETS", "-FlashMHAA")
    settings.reload()
    assert "the nearest is FlashMHA" in environment.problems()[0]


def test_a_class_that_is_left_out_stays_unpatched(monkeypatch):
    from flashbias_patch.patching import install

    monkeypatch.setenv("FLASHBIAS_TARGETS", "-FlashMHA")
    settings.reload()

    def forward(self, q, k, v, key_padding_mask=None):
        return q

    assert not install.claim(type("FlashMHA", (), {"forward": forward}))
