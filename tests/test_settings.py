"""Every FLASHBIAS_* variable: parsed once, refused by name."""
import pytest

from flashbias_patch.settings import FALSE, TRUE, VARIABLES, Settings

GOOD = {
    "patch": [("1", True), ("TRUE", True), ("off", False), ("No", False)],
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
    "tune": [("off", 0.0), ("0", 0.0), ("on", 60.0), ("20", 20.0), ("2.5", 2.5)],
    "log_level": [("INFO", "info")],
}
BAD = [("patch", "maybe", TRUE + FALSE), ("backend", "fastest", ("triton", "reference")), ("strict", "2", TRUE),
       ("dtype", "fp8", ("fp16", "bf16", "fp32")), ("rank", "0", ("1 to 256",)), ("rank", "x", ("integer",)),
       ("energy", "1.5", ("(0, 1]",)), ("max_error", "-1", ("0 to 1",)), ("log_level", "loud", ("warning",)),
       ("tune", "soon", ("off, on", "2 to 3600")), ("tune", "-5", ("seconds",)), ("tune", "nan", ("seconds",))]


def test_every_variable_is_tested():
    assert set(GOOD) == {v.field for v in VARIABLES}


@pytest.mark.parametrize("field, text, value", [(f, t, v) for f, pairs in GOOD.items() for t, v in pairs])
def test_good_values(field, text, value):
    read = Settings({f"FLASHBIAS_{field.upper()}": f" {text} "})
    assert getattr(read, field) == value and not read.problems


@pytest.mark.parametrize("field, text, allowed", BAD)
def test_bad_values_are_refused_by_name_with_what_is_allowed(field, text, allowed):
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
