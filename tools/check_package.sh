#!/usr/bin/env bash
# Builds the wheel and the source distribution, installs the wheel in a fresh environment and uses it there.
# Usage: tools/check_package.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$PYTHON" -m pip install --quiet build
"$PYTHON" -m build --outdir "$WORK/dist" . > "$WORK/build.log" 2>&1 || { cat "$WORK/build.log"; exit 1; }

tar tzf "$WORK"/dist/*.tar.gz > "$WORK/contents"
for file in sitecustomize_example/sitecustomize.py sitecustomize_example/README.md LICENSE README.md tests/conftest.py; do
    grep -q "/$file\$" "$WORK/contents" || { echo "the source distribution lacks $file" >&2; exit 1; }
done

"$PYTHON" -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet "$WORK"/dist/*.whl
cd "$WORK"
for command in "--version" "doctor" "doctor --json" "ab --help" "report --help" "run -- true"; do
    # shellcheck disable=SC2086
    "$WORK/venv/bin/flashbias" $command > "$WORK/out.log" 2>&1 || { cat "$WORK/out.log"; echo "flashbias $command failed" >&2; exit 1; }
done
"$WORK/venv/bin/python" - <<'PY'
import os, sys
import flashbias_patch
assert "site-packages" in flashbias_patch.__file__, flashbias_patch.__file__
home = os.path.dirname(flashbias_patch.__file__)
for name in ("py.typed", "bootstrap/sitecustomize.py", "ab/templates"):
    assert os.path.exists(os.path.join(home, name)), name + " is missing from the wheel"
assert not {"torch", "wrapt", "numpy"} & set(sys.modules)
print("wheel:", flashbias_patch.__version__, "installs and runs without torch")
PY
