#!/usr/bin/env bash
# Builds the wheel and the source distribution, checks both, installs the wheel in a fresh environment and uses it there.
# Usage: tools/check_package.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$PYTHON" -m venv "$WORK/tools"
"$WORK/tools/bin/pip" install --quiet --disable-pip-version-check build twine check-wheel-contents
"$WORK/tools/bin/python" -m build --outdir "$WORK/dist" . > "$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; exit 1; }
if grep -i -A 12 "warning: package\|deprecat\|absent from" "$WORK/build.log"; then
    echo "the build warns: see above" >&2
    exit 1
fi
"$WORK/tools/bin/twine" check --strict "$WORK"/dist/*
# W002, duplicate files: the licence and the example sitecustomize.py lie in share/doc, too, where README.md points to.
"$WORK/tools/bin/check-wheel-contents" --ignore W002 --toplevel flashbias_patch "$WORK"/dist/*.whl

tar tzf "$WORK"/dist/*.tar.gz > "$WORK/contents"
for file in sitecustomize_example/sitecustomize.py sitecustomize_example/README.md LICENSE README.md CHANGELOG.md docs/quickstart.md \
    examples/aqr/mini_cmt_aqr.sh tests/conftest.py; do
    grep -q "/$file\$" "$WORK/contents" || { echo "the source distribution lacks $file" >&2; exit 1; }
done

"$PYTHON" -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check "$WORK"/dist/*.whl
cd "$WORK"
for command in "--version" "doctor" "doctor --json" "ab --help" "report --help" "run -- true"; do
    # shellcheck disable=SC2086
    "$WORK/venv/bin/flashbias" $command > "$WORK/out.log" 2>&1 || { cat "$WORK/out.log"; echo "flashbias $command failed" >&2; exit 1; }
done
"$WORK/venv/bin/python" - <<'PY'
import os, re, sys
import flashbias_patch
assert "site-packages" in flashbias_patch.__file__, flashbias_patch.__file__
home = os.path.dirname(flashbias_patch.__file__)
for name in ("py.typed", "bootstrap/sitecustomize.py", "ab/templates"):
    assert os.path.exists(os.path.join(home, name)), name + " is missing from the wheel"
assert not {"torch", "wrapt", "numpy"} & set(sys.modules)
documents = os.path.join(sys.prefix, "share", "doc", "flashbias-patch")
text = open(os.path.join(documents, "README.md"), encoding="utf-8").read()
for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
    assert os.path.exists(os.path.join(documents, target)), "README.md points to " + target + ", which the wheel lacks"
print("wheel:", flashbias_patch.__version__, "installs and runs without torch")
PY
