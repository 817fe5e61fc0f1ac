"""Every FLASHBIAS_* variable: parsed once, refused by name; unknown names and misspelt values with
the nearest known."""

import logging

import pytest

import flashbias_patch
from flashbias_patch import environment, settings, telemetry
from flashbias_patch.settings import FALSE, TRUE, VARIABLES, Settings

GOOD = {
    "patch": [
        ("1", True),
        ("TRUE", True),
        ("off", False),
        ("No", False),
        ("none", False),
        ("Disabled", False),
        ("n", False),
        ("enabled", True),
    ],
    "summary": [("1", True), ("off", False)],
    "backend": [("SDPA", "sdpa"), ("auto", "auto")],
    "strict": [("1", True), ("0", False)],
    "targets": [("FlashMHA, PETRMultiheadAttention", ("FlashMHA", "PETRMultiheadAttention"))],
    "home": [("/some/where", "/some/where")],
    "dtype": [("fp16", "fp16"), ("BF16", "bf16")],
    "masks": [("honour", "honour")],
    "rank": [("8", 8)],
    "energy": [("0.9", 0.9)],
    "max_error": [("0.1", 0.1)],
    "aqr": [("enable=1", "enable=1")],
    "compat": [("none", ("none",)), ("turtle,dn_index", ("turtle", "dn_index"))],
    "verdicts": [("off", False), ("1", True)],
    "log_level": [("INFO", "info")],
}
BAD = [
    ("patch", "maybe", TRUE + FALSE),
    ("backend", "fastest", ("triton", "reference")),
    ("strict", "2", TRUE),
    ("dtype", "fp8", ("fp16", "bf16", "fp32")),
    ("rank", "0", ("1 to 256",)),
    ("rank", "x", ("integer",)),
    ("energy", "1.5", ("(0, 1]",)),
    ("max_error", "-1", ("0 to 1",)),
    ("log_level", "loud", ("warning",)),
]


def test_every_variable_is_tested():
    assert set(GOOD) == {v.field for v in VARIABLES}


@pytest.mark.parametrize(
    "field, text, value", [(f, t, v) for f, pairs in GOOD.items() for t, v in pairs]
)
def test_good_values(field, text, value):
    read = Settings({f"FLASHBIAS_{field.upper()}": f" {text} "})
    assert getattr(read, field) == value and not read.problems


@pytest.mark.parametrize("field, text, allowed", BAD)
def test_bad_values_are_named_with_the_allowed_ones(field, text, allowed):
    read = Settings({f"FLASHBIAS_{field.upper()}": text})
    default = next(v.default for v in VARIABLES if v.field == field)
    assert getattr(read, field) == default
    (problem,) = read.problems
    assert f"FLASHBIAS_{field.upper()}={text!r}" in problem
    assert all(word in problem for word in allowed)


def test_empty_and_unset_are_the_default():
    assert Settings({}).as_dict() == Settings({v.name: " " for v in VARIABLES}).as_dict()


def test_an_unknown_setting_names_the_known_ones():
    with pytest.raises(AttributeError, match="max_error"):
        Settings({}).maximum_error  # noqa: B018


# -- misspelt --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, text, near",
    [
        ("backend", "tritn", "triton"),
        ("dtype", "fp-16", "fp16"),
        ("masks", "honor", "honour"),
        ("patch", "ture", "true"),
    ],
)
def test_a_misspelt_value_is_named_with_the_nearest(field, text, near):
    (problem,) = Settings({f"FLASHBIAS_{field.upper()}": text}).problems
    assert f"the nearest is {near!r}" in problem


def test_a_retired_name_says_what_to_do_instead():
    (message,) = Settings({"FLASHBIAS_TUNE": "60"}).unknown
    assert message == (
        "FLASHBIAS_TUNE has no effect any more: tile shapes are not tuned during a run; "
        "run `flashbias tune` before it."
    )


@pytest.mark.parametrize(
    "name, near",
    [
        ("FLASHBIAS_BACKENDS", "FLASHBIAS_BACKEND"),
        ("FLASHBIAS_TARGET", "FLASHBIAS_TARGETS"),
        ("FLASHBIAS_MAXERROR", "FLASHBIAS_MAX_ERROR"),
        ("flashbias_patch", "FLASHBIAS_PATCH"),
        ("FLASH_BIAS_DTYPE", "FLASHBIAS_DTYPE"),
        ("FLASHBAIS_PATCH", "FLASHBIAS_PATCH"),
        ("FLASHBIAS_QQQQQQQQ", None),
    ],
)
def test_an_unknown_name_is_named_with_the_nearest(name, near):
    read = Settings({name: "1"})
    (message,) = read.unknown
    assert message.startswith(f"{name} is not a variable") and not read.problems
    assert (
        (f"the nearest known is {near}." in message)
        if near
        else all(v.name in message for v in VARIABLES)
    )


@pytest.mark.parametrize(
    "name",
    [
        "FLASH_ATTENTION_SKIP_CUDA_BUILD",
        "FLASHINFER_WORKSPACE",
        "FLASHBIAS_PROBE_STEPS",
        "FLASHBIAS_FUZZ",
        "FLASK_ENV",
        "PATH",
        *(v.name for v in VARIABLES),
    ],
)
def test_variables_of_others_are_not_named(name):
    assert Settings({name: "1"}).unknown == []


NAMES = {
    "FLASHBIAS_TARGETS": (
        "PetrMultiHeadAttention,FlashMHA",
        "PetrMultiHeadAttention (the nearest is PETRMultiheadAttention)",
        "PETRTransformerDecoderLayer",
    ),
    "FLASHBIAS_COMPAT": ("turtel", "turtel (the nearest is turtle)", "numpy_aliases"),
    "FLASHBIAS_AQR": ("camera=3", "unknown option camera", "cameras"),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_names_that_match_nothing_known_are_named_once(monkeypatch, caplog, name):
    text, named, known = NAMES[name]
    monkeypatch.setenv(name, text)
    settings.reload()
    (problem,) = environment.problems()
    assert name in problem and named in problem and known in problem and "FlashMHA (" not in problem
    for _ in range(2):
        flashbias_patch.install()
        flashbias_patch.uninstall()
    assert caplog.text.count(named) == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("FLASHBIAS_TARGETS", "FlashMHA, CmtHead"),
        ("FLASHBIAS_COMPAT", "none"),
        ("FLASHBIAS_COMPAT", "off"),
        ("FLASHBIAS_COMPAT", "turtle,dn_index"),
        ("FLASHBIAS_COMPAT", "1"),
        ("FLASHBIAS_AQR", "1"),
        ("FLASHBIAS_AQR", "none"),
        ("FLASHBIAS_AQR", "per=head,cameras=6"),
        ("FLASHBIAS_TARGETS", " "),
    ],
)
def test_known_names_are_not_named(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    settings.reload()
    assert environment.problems() == []


def test_what_is_named_once_is_not_named_by_child_processes(monkeypatch, caplog):
    monkeypatch.setenv(settings.NAMED, "")
    telemetry.environment(["first", "second"])
    telemetry.reset()  # as in a process that this one starts: only the environment is inherited
    telemetry.environment(["second", "third"])
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "first",
        "second",
        "third",
    ]
