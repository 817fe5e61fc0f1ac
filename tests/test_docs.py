"""What the documentation says of measured figures is what the JSON files hold."""
import re

import pytest

from tests.scripts import ROOT, load


@pytest.fixture(scope="module")
def generated():
    return load("docs/make_performance.py")


def without_commits(text):
    return re.sub(r"\(commit \w*\)", "", text)


def test_performance_page_is_generated(generated):
    assert without_commits((ROOT / "docs" / "performance.md").read_text()) == without_commits(generated.performance())


def test_readme_table_is_generated(generated):
    assert (ROOT / "README.md").read_text() == generated.readme()


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "sitecustomize_example").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_every_setting_is_in_the_readme():
    from flashbias_patch.settings import VARIABLES

    text = (ROOT / "README.md").read_text()
    assert [v.name for v in VARIABLES if v.name not in text] == []
