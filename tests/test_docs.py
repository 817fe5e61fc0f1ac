"""What the documentation says of measured figures is what the JSON files hold."""

import re

import pytest

from tests.support.scripts import ROOT, load


@pytest.fixture(scope="module")
def generated():
    return load("docs/make_performance.py")


def without_commits(text):
    return re.sub(r"\(commit \w*\)", "", text)


def test_performance_page_is_generated(generated):
    assert without_commits((ROOT / "docs" / "performance.md").read_text()) == without_commits(
        generated.performance()
    )


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_table_is_generated(generated, name):
    assert (ROOT / name).read_text(encoding="utf-8") == generated.readme(name)


def test_links_lead_somewhere():
    """In a clone, where the pages that only the site has do not exist."""
    folders = [
        (ROOT, "*.md"),
        *((ROOT / name, "**/*.md") for name in ("docs", "examples", "sitecustomize_example")),
    ]
    for page in [page for folder, pattern in folders for page in folder.glob(pattern)]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists(), f"{page.name} points to {target}"


def test_quickstart_shows_the_code_of_the_example():
    """In the page itself: a directive of the site shows no code to those who read the page in a
    clone."""
    source = (ROOT / "examples" / "window_bias" / "train.py").read_text(encoding="utf-8")
    code = re.search(
        r"^# \[start: docs/quickstart.md\]\n(.*?)^# \[end", source, re.MULTILINE | re.DOTALL
    ).group(1)
    assert f"```python\n{code.rstrip()}\n```\n" in (ROOT / "docs" / "quickstart.md").read_text(
        encoding="utf-8"
    )


def test_no_page_needs_the_site_for_its_text():
    pages = [
        page
        for page in (ROOT / "docs").rglob("*.md")
        if "--8<--" in page.read_text(encoding="utf-8")
    ]
    assert pages == []


def test_quoted_verdicts_can_occur():
    """`flashbias ab` says `within rounding` of small differences only; over that it says `within
    noise`."""
    from flashbias_patch.ab.parity import ROUNDING

    most = max(100 * limit for *_, limit in ROUNDING.values())
    for page in (ROOT / "docs").rglob("*.md"):
        for figure in re.findall(
            r"within rounding; largest difference ([\d.]+) ?%", page.read_text(encoding="utf-8")
        ):
            assert float(figure) <= most, page.name


def test_every_setting_is_in_the_readme():
    from flashbias_patch.settings import VARIABLES

    text = (ROOT / "README.md").read_text()
    assert [v.name for v in VARIABLES if v.name not in text] == []


PAGES = sorted((ROOT / "docs").glob("**/*.md"))


def test_the_files_that_the_design_pages_name_exist():
    package = ROOT / "flashbias_patch"
    named = {}
    for page in (ROOT / "docs" / "design").glob("*.md"):
        for name in re.findall(r"`([\w/]+/[\w]+\.py)`", page.read_text(encoding="utf-8")):
            named[name] = page.name
    missing = [
        f"{page}: {name}"
        for name, page in named.items()
        if not (package / name).exists() and not (ROOT / name).exists()
    ]
    assert named and not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_table_has_a_header(page):
    """A block of lines with bars and no line of dashes is shown as text, not as a table."""
    blocks = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks:
        lines = block.splitlines()
        assert len(lines) > 1 and re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", lines[1]), block[:120]
