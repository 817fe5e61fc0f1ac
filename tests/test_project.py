"""The project around the code: one version, one set of CI commands, two READMEs that agree,
documented names."""

import re
import subprocess
import sys

import pytest

from tests.support.scripts import ROOT, load

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_is_written_once():
    import flashbias_patch

    version = flashbias_patch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    released = re.search(r"^## (\d\S+) - (\S+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert released and released.group(1) == version
    assert f"\ndate-released: {released.group(2)}\n" in read("CITATION.cff")
    for name in ("README.md", "README.zh-CN.md", "docs/guides/deployment.md"):
        assert set(re.findall(r"flashbias_patch-(\S+)-py3", read(name))) == {version}, name
    written = [
        path
        for path in (ROOT / "flashbias_patch").rglob("*.py")
        if version in path.read_text(encoding="utf-8")
    ]
    assert [path.name for path in written] == ["_version.py"]


def test_workflow_runs_what_the_ci_script_runs():
    script = re.findall(r"^(?:make|tools/)[^#\n]*", read(".ci/run"), re.MULTILINE)
    script = {re.sub(r' PYTHON="\$PYTHON"', "", line).strip() for line in script}
    text = WORKFLOW.read_text()
    quoted = re.findall(r"command: (?:'([^']*)'|\"([^\"]*)\")", text)
    steps = {line.strip() for line in re.findall(r"run: ((?:make|tools/)[^#\n]*)", text)}
    steps |= {single or double for single, double in quoted}
    assert steps == script - {"make .venv/ready"}


def test_hooks_before_a_commit_run_what_lint_runs():
    lint = read("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    checks = ("tools/check_imports.py", "tools/check_private_names.py")
    for tool in ("ruff check", "ruff format", "mypy", *checks):
        assert tool in lint and tool in read(".pre-commit-config.yaml")


def test_import_contract():
    contract = load("tools/check_imports.py")
    assert contract.violations() == []
    kernels = ROOT / "flashbias_patch" / "attention" / "kernels" / "launcher.py"
    seen = {name for _, name in contract.imported(kernels)}
    assert any(contract.inside(name, "attention.kernels") for name in seen), (
        "relative imports are resolved"
    )


def test_private_names_of_torch_are_read_in_one_file():
    contract = load("tools/check_imports.py")
    assert contract.private_uses() == []
    source = (
        "import torch\nfrom torch import nn\nfrom torch.utils import _pytree\n"
        "import torch.nn.functional as F\n"
        "torch._C.DisableTorchFunction()\nself.torch.cuda._sleep(1)\n"
        "getattr(nn.Module, '_call_impl', None)\nF._canonical_mask\n"
        "module._parameters, torch.__version__, nn.Linear\n"
    )
    assert sorted(set(contract.private_torch_names(contract.ast.parse(source)))) == [
        (3, "torch.utils._pytree"),
        (5, "torch._C"),
        (6, "torch.cuda._sleep"),
        (7, "torch.nn.Module._call_impl"),
        (8, "torch.nn.functional._canonical_mask"),
    ]


def test_tests_use_no_private_names_of_the_package():
    check = load("tools/check_private_names.py")
    assert check.found() == []
    source = (
        "import torch, cached_launches\nfrom torch.utils import _pytree\n"
        "from flashbias_patch import bias, _mine\nfrom flashbias_patch.bias import _mine as other\n"
        "torch._C._mine()\ncached_launches._mine()\nmodule._theirs, module._replace(x=1)\n"
        "class Own:\n    def _own(self):\n        return self._mine + super()._mine\n"
        "Own()._own()\nbias._own\n"
        "module._mine = 1\ntorch.ones(3)._mine\nbias.made(1)[0].x._mine\n"
        "monkeypatch.setattr(bias, '_mine', 1)\nmock.patch.object(bias, '_mine')\n"
        "monkeypatch.setattr('flashbias_patch.bias._mine', 1)\nmodule._stand_in\n"
    )
    private = {"_mine", "_own", "_replace", "_stand_in"}
    uses = list(check.uses(check.ast.parse(source), private, {"_stand_in"}))
    assert sorted(line for line, _ in uses) == [3, 4, 12, 13, 14, 15, 16, 17, 18]
    lines = ["# private name: why", "module._mine", "module._mine"]
    assert [check.excepted(lines, line) for line in (1, 2, 3)] == [True, True, False]


def test_no_modules_of_attention_import_each_other_in_a_circle():
    contract = load("tools/check_imports.py")
    assert contract.circular_imports() == []
    graph = contract.import_graph()
    assert "attention.backends.sdpa" in graph["attention.selection"]  # by a computed name
    assert "attention.plans" in graph["attention.dispatch"]
    graph["attention.signature"] = {"attention.dispatch"}
    assert any("attention.dispatch" in circle for circle in contract.circles(graph))


def test_templates_ask_for_what_doctor_prints():
    for name in (
        ".github/ISSUE_TEMPLATE/fault.yml",
        ".github/ISSUE_TEMPLATE/target.yml",
        ".github/pull_request_template.md",
        "CONTRIBUTING.md",
    ):
        assert "flashbias doctor --repo . --markdown" in read(name)


def test_the_site_is_built_strictly():
    recipe = read("Makefile").partition("\ndocs:")[2].partition("\n\n")[0]
    assert "mkdocs build --strict" in recipe
    assert "--quiet" not in recipe.partition("mkdocs build")[2], (
        "mkdocs counts no warnings then: dead links pass"
    )


def test_every_public_name_is_documented():
    assert list(load("docs/site_hooks.py").undocumented()) == []


def test_an_undocumented_name_is_found(monkeypatch):
    hooks = load("docs/site_hooks.py")
    monkeypatch.setattr(
        hooks, "exported", lambda module: {"once": "telemetry"} if module == "" else {}
    )
    assert [line.partition(":")[0] for line in hooks.undocumented()] == [
        "flashbias_patch.telemetry.once is not on docs/reference/api.md"
    ]


def test_generated_pages_hold_what_they_are_made_from():
    from flashbias_patch.cli.main import COMMANDS
    from flashbias_patch.patching.catalog import TARGETS
    from flashbias_patch.settings import VARIABLES

    pages = load("docs/site_hooks.py").PAGES
    settings, commands, classes = (
        pages[f"reference/{name}.md"]() for name in ("settings", "cli", "classes")
    )
    assert [v.name for v in VARIABLES if f"`{v.name}`" not in settings] == []
    assert [name for name in COMMANDS if f"## flashbias {name}\n" not in commands] == []
    assert [t.name for t in TARGETS if f"`{t.name}`" not in classes] == []
    for option in ("--repeats", "--repo", "--off"):
        assert option in commands


# -- the two READMEs -------------------------------------------------------------------------------


def common_part(name):
    """What both READMEs have: from the top to the table of variables, which is in English only."""
    return re.split(r"^(?:\| variable|所有环境变量)", read(name), maxsplit=1, flags=re.MULTILINE)[0]


def commands_of(text):
    """Lines of code blocks, fenced or indented, without their comments and alignment."""
    fenced = re.findall(r"^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [
        line
        for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
        if line.startswith("    ")
    ]
    return [
        command
        for command in (re.split(r"\s+#|\s{8}", line.strip())[0] for line in lines)
        if command
    ]


def numbers_of(text):
    """Numbers outside code blocks, in order: figures, versions, times."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\d+(?:\.\d+)*", prose)


def test_readmes_have_the_same_commands():
    english, chinese = (commands_of(common_part(name)) for name in ("README.md", "README.zh-CN.md"))
    assert len(english) > 12 and chinese == english


def test_readmes_have_the_same_numbers():
    english, chinese = (
        sorted(numbers_of(common_part(name))) for name in ("README.md", "README.zh-CN.md")
    )
    assert len(english) > 60 and chinese == english


def test_readmes_have_the_same_links():
    english, chinese = (
        re.findall(r"\]\(([^)]+)\)", common_part(name)) for name in ("README.md", "README.zh-CN.md")
    )
    assert sorted(set(chinese) - {"README.md"}) == sorted(set(english) - {"README.zh-CN.md"})


# -- the example of the quickstart -----------------------------------------------------------------


@pytest.mark.slow
def test_window_example_is_the_same_without_the_patch():
    """The dense mask that it uses unpatched is the bias that it uses patched."""
    import os

    losses = []
    for patch in ("0", "1"):
        command = [
            sys.executable,
            "-c",
            "import flashbias_patch, runpy, sys; sys.argv = sys.argv[1:];"
            "runpy.run_path(sys.argv[0], run_name='__main__')",
            str(ROOT / "examples/window_bias/train.py"),
            "--steps",
            "2",
            "--dropout",
            "0",
            "--no-cp",
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "FLASHBIAS_PATCH": patch, "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        losses.append([float(loss) for loss in re.findall(r" loss: (\S+)", done.stdout)])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_documented_entry_point_is_what_the_catalog_reads():
    from flashbias_patch.patching.catalog import ENTRY_POINT_GROUP, Target
    from flashbias_patch.patching.seams import SEAMS

    page = read("docs/guides/own-targets.md")
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    targets = [Target(*item) for item in names["TARGETS"]]
    assert [target.name for target in targets] == ["MyCrossAttention", "MyDecoderLayer"]
    assert f'entry-points."{ENTRY_POINT_GROUP}"' in page
    documented = set(re.findall(r"^\| `([\w ]+)` \|", page.partition("## Seams")[2], re.MULTILINE))
    assert {target.seam for target in targets} <= documented <= set(SEAMS)
