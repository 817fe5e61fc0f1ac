#!/usr/bin/env bash
# The plan's stack, into the Python 3.10 environment that is active: torch 2.1.0 (CUDA 12.1), triton 3.0.0, mmcv-full 1.7.2 with
# CUDA operators, mmdet 2.28.2, mmsegmentation 0.30.0, mmdet3d 1.0.0rc6, spconv, and this package.
# Usage: environments/mmdet3d-v1.sh           (PIP="uv pip" for uv; TORCH_CUDA_ARCH_LIST, MAX_JOBS as PyTorch's builds read them)
# mmcv-full is compiled: a quarter of an hour on two cores, with nvcc of CUDA 12.1 on the path. WHEELS_ONLY=1 leaves out what is built
# from source, as tests/test_environments.py does; tools/openmmlab_env.sh builds the same versions for a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PIP=${PIP:-python -m pip}

wheels() { $PIP install "$@"; }
from_source() { # compiled against the torch that is installed
    [ -z "${WHEELS_ONLY:-}" ] || return 0
    MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0;8.6;9.0+PTX} $PIP install --no-build-isolation "$@"
}

wheels "setuptools<70" wheel "numpy==1.23.5" cython ninja
wheels torch==2.1.0 torchvision==0.16.0 "numpy==1.23.5"
wheels --no-deps triton==3.0.0  # torch 2.1.0 asks for 2.1.0; the fused kernels need 3.0
from_source mmcv-full==1.7.2 "numpy==1.23.5" "opencv-python-headless<4.10"
wheels mmdet==2.28.2 mmsegmentation==0.30.0 "numpy==1.23.5"
wheels "numpy==1.23.5" numba==0.57.1 nuscenes-devkit==1.1.11 "opencv-python-headless<4.10" "networkx<3.5" plyfile scikit-image \
    tensorboard trimesh einops scipy shapely pandas
wheels --no-deps lyft_dataset_sdk black fire flake8
wheels spconv-cu120 "numpy==1.23.5"  # built for CUDA 12.0, runs with 12.1
from_source --no-deps mmdet3d==1.0.0rc6
wheels ".[report]" "numpy==1.23.5"

if [ -z "${WHEELS_ONLY:-}" ]; then # mmdet3d 1.0.0rc6 asserts mmcv <= 1.7.0, while only 1.7.2 builds with torch 2.1
    INIT=$(python -c "import importlib.util as u; print(u.find_spec('mmdet3d').submodule_search_locations[0])")/__init__.py
    sed -i "s/^mmcv_maximum_version = .*/mmcv_maximum_version = '1.7.2'/" "$INIT"
    flashbias doctor
fi
