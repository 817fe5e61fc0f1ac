#!/usr/bin/env bash
# Current torch with mmengine and mmcv-lite 2.x, and this package, into the environment that is active (Python 3.8 or later).
# Usage: environments/mmengine.sh           (PIP="uv pip" for uv)
set -euo pipefail
cd "$(dirname "$0")/.."
PIP=${PIP:-python -m pip}

$PIP install torch numpy setuptools wheel
$PIP install mmengine "mmcv-lite>=2.0" opencv-python-headless
$PIP install ".[report]"
[ -n "${WHEELS_ONLY:-}" ] || flashbias doctor
