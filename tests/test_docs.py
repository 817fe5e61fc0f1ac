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


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_table_is_generated(generated, name):
    assert (ROOT / name).read_text(encoding="utf-8") == generated.readme(name)


def test_links_lead_somewhere():
    generated = {ROOT / "docs" / name for name in load("docs/site_hooks.py").PAGES}  # made when the site is built
    folders = [(ROOT, "*.md"), *((ROOT / name, "**/*.md") for name in ("docs", "examples", "sitecustomize_example"))]
    for page in [page for folder, pattern in folders for page in folder.glob(pattern)]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in generated, f"{page.name} points to {target}"


def test_every_setting_is_in_the_readme():
    from flashbias_patch.settings import VARIABLES

    text = (ROOT / "README.md").read_text()
    assert [v.name for v in VARIABLES if v.name not in text] == []
