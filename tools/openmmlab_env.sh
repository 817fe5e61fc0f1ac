#!/usr/bin/env bash
# Builds the environments that tests/integration/openmmlab runs in, from nothing:
#   v1    Python 3.10, torch 2.1.0, triton 3.0.0, mmcv-full 1.7.2, mmdet 2.28.2, mmsegmentation 0.30.0, mmdet3d 1.0.0rc6
#   v2    mmengine and mmcv-lite 2.x on the current torch
#   py38  Python 3.8, torch 2.1.0 and wrapt 1.14.0: the oldest of each that is supported
#   mid   torch 2.6.0, between the oldest and the newest, under Python 3.13 where that is here
#   t19   Python 3.8 and torch 1.9.1, which CMT, PETR and StreamPETR document
#   t113  Python 3.10 and torch 1.13.1, which SparseDrive and OmniDrive document
# Usage: tools/openmmlab_env.sh [--dir DIR] [--find-links DIR] [v1] [v2] [py38] [mid] [t19] [t113]   (no name: v1 and v2)
# Each step leaves a stamp holding its own text, so that a second run repeats only what has changed.
# Interpreters: PYTHON310, PYTHON38, PYTHON_V2, PYTHON313 (default: python3.10, python3.8, python3, python3.13).
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=.venv-openmmlab
LINKS=../shared/wheels
ENVS=()
while [ $# -gt 0 ]; do
    case $1 in
        --dir) DIR=$2; shift 2 ;;
        --find-links) LINKS=$2; shift 2 ;;
        v1 | v2 | py38 | mid | t19 | t113) ENVS+=("$1"); shift ;;
        *) echo "$0: unknown argument '$1'; expected --dir DIR, --find-links DIR, v1, v2, py38, mid, t19 or t113" >&2; exit 2 ;;
    esac
done
[ ${#ENVS[@]} -gt 0 ] || ENVS=(v1 v2)
mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The CUDA build of torch 2.1.0 loads these when it is imported, GPU or not; NCCL too. They are its own pins.
TORCH21=(torch==2.1.0)
TEST=(pytest pytest-timeout pytest-xdist hypothesis rich)

find_python() { # VERSION OVERRIDE -> an interpreter of that version
    local found
    for found in "$2" "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if [ -n "$found" ] && "$found" -c "import sys; sys.exit(sys.version_info[:2] != ($(echo "$1" | tr . ,)))" 2>/dev/null; then
            echo "$found"; return
        fi
    done
    echo "Python $1 is not here: install it or name it with PYTHON${1/./}=" >&2
    return 1
}

step() { # NAME COMMAND...: run it in the environment $VENV unless it was run just so
    local name=$1 stamp
    shift
    stamp=$VENV/.steps/$name
    if [ "$(cat "$stamp" 2>/dev/null)" = "$*" ]; then
        echo "[$(basename "$VENV")] $name: done before"
        return
    fi
    echo "[$(basename "$VENV")] $name ..."
    local start=$SECONDS
    "$@"
    mkdir -p "$VENV/.steps"
    echo "$*" > "$stamp"
    echo "[$(basename "$VENV")] $name: $((SECONDS - start)) s"
}

venv() { [ -x "$VENV/bin/python" ] || "$1" -m venv "$VENV"; }
pip_() { "$VENV/bin/python" -m pip install --quiet --no-warn-conflicts "$@"; }
pip_isolated_off() { MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=${MAX_JOBS:-$(nproc)} pip_ --no-build-isolation "$@"; }

allow_mmcv_172() { # mmdet3d 1.0.0rc6 asserts mmcv <= 1.7.0, while only 1.7.2 builds with torch 2.1
    local init
    init=$("$VENV/bin/python" -c "import importlib.util as u; print(u.find_spec('mmdet3d').submodule_search_locations[0])")/__init__.py
    sed -i "s/^mmcv_maximum_version = .*/mmcv_maximum_version = '1.7.2'/" "$init"
    # Changed within a second of its installation and of the same size, it would pass for what was compiled then.
    rm -f "$(dirname "$init")"/__pycache__/__init__.*.pyc
}

v1() {
    local links=()
    [ -d "$LINKS" ] && links=(--find-links "$LINKS")
    venv "$(find_python 3.10 "${PYTHON310:-}")"
    step base pip_ "setuptools<70" wheel "numpy==1.23.5" cython
    step torch pip_ "${TORCH21[@]}" torchvision==0.16.0 "numpy==1.23.5"
    step triton pip_ --no-deps triton==3.0.0
    # From source this takes a quarter of an hour on two cores; a wheel built for exactly this saves it.
    step mmcv pip_isolated_off ${links[@]+"${links[@]}"} mmcv-full==1.7.2 "numpy==1.23.5" "opencv-python-headless<4.10"
    step mmdet pip_ mmdet==2.28.2 mmsegmentation==0.30.0 "numpy==1.23.5"
    step support pip_ "numpy==1.23.5" numba==0.57.1 nuscenes-devkit==1.1.11 "opencv-python-headless<4.10" \
        "networkx<3.5" plyfile scikit-image tensorboard trimesh einops scipy shapely pandas
    step lyft pip_ --no-deps lyft_dataset_sdk black fire flake8
    step mmdet3d pip_isolated_off --no-deps mmdet3d==1.0.0rc6
    step mmcv-version allow_mmcv_172
    step test pip_ "wrapt>=1.14" "${TEST[@]}" "numpy==1.23.5"
    "$VENV/bin/python" -c "import torch, triton, mmcv, mmdet, mmdet3d
print('torch', torch.__version__, 'triton', triton.__version__, 'mmcv', mmcv.__version__, 'mmdet3d', mmdet3d.__version__)"
}

v2() {
    venv "${PYTHON_V2:-python3}"
    step torch pip_ torch numpy setuptools wheel
    step mmengine pip_ mmengine "mmcv-lite>=2.0" opencv-python-headless
    step test pip_ "wrapt>=1.14" "${TEST[@]}" scipy
    "$VENV/bin/python" -c "import torch, mmengine, mmcv
print('torch', torch.__version__, 'mmengine', mmengine.__version__, 'mmcv', mmcv.__version__)"
}

py38() {
    venv "$(find_python 3.8 "${PYTHON38:-}")"
    step torch pip_ "${TORCH21[@]}" "numpy<1.25" scipy
    step test pip_ wrapt==1.14.0 "${TEST[@]}"
    "$VENV/bin/python" -c "import sys, torch, wrapt
print('Python', sys.version.split()[0], 'torch', torch.__version__, 'wrapt', wrapt.__version__)"
}

mid() {
    venv "$(find_python 3.13 "${PYTHON313:-}" || echo "${PYTHON_V2:-python3}")"
    step torch pip_ torch==2.6.0 "numpy<2.4" scipy
    step test pip_ "wrapt>=1.14" "${TEST[@]}"
    "$VENV/bin/python" -c "import sys, torch, triton
print('Python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__)"
}

old() { # PYTHON TORCH NUMPY: a torch that is older than the kernels
    venv "$1"
    step torch pip_ "torch==$2" "numpy$3" scipy
    step test pip_ "wrapt>=1.14" "${TEST[@]}"
    "$VENV/bin/python" -c "import sys, torch
print('Python', sys.version.split()[0], 'torch', torch.__version__)"
}

t19() { old "$(find_python 3.8 "${PYTHON38:-}")" 1.9.1 "<1.24"; }
t113() { old "$(find_python 3.10 "${PYTHON310:-}")" 1.13.1 "<2"; }

for name in "${ENVS[@]}"; do
    VENV=$DIR/$name
    "$name"
done
