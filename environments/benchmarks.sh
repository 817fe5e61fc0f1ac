#!/usr/bin/env bash
# What benchmarks/real_models.py and its relatives need beside a current torch and torchvision, into the active environment: mmcv, mmdet and
# mmdet3d of the first generation without compiled operators, spconv for the fusion detectors, and this package.
# docs/guides/measuring.md says how to use it. Trainings of your own need mmcv's operators: environments/mmdet3d-v1.sh.
# Usage: environments/benchmarks.sh           (PIP="uv pip" for uv; SPCONV names the build of spconv, empty for none)
# WHEELS_ONLY=1 leaves out what is built from source, as tests/test_environments.py does.
set -euo pipefail
cd "$(dirname "$0")/.."
PIP=${PIP:-python -m pip}

wheels() { $PIP install "$@"; }
from_source() {
    [ -z "${WHEELS_ONLY:-}" ] || return 0
    MMCV_WITH_OPS=0 $PIP install --no-build-isolation "$@"
}

wheels "setuptools<81" wheel # mmcv's setup.py imports pkg_resources
from_source --no-deps mmcv==1.7.2
wheels --no-deps mmdet==2.28.2 mmsegmentation==0.30.0 mmcls==0.25.0 nuscenes-devkit==1.1.11 lyft_dataset_sdk yapf==0.40.1
wheels addict terminaltables pycocotools pyquaternion shapely plyfile trimesh prettytable cachetools six fire descartes \
    platformdirs tomli importlib_metadata packaging pyyaml tqdm matplotlib opencv-python-headless scipy scikit-learn numba pandas scikit-image networkx \
    tensorboard einops
from_source --no-deps mmdet3d==1.0.0rc6
SPCONV=${SPCONV-spconv-cu126==2.3.8 cumm-cu126==0.7.11}
[ -z "$SPCONV" ] || wheels $SPCONV
wheels ".[report]"

if [ -z "${WHEELS_ONLY:-}" ]; then # mmdet3d 1.0.0rc6 asserts mmcv <= 1.7.0
    INIT=$(python -c "import importlib.util as u; print(u.find_spec('mmdet3d').submodule_search_locations[0])")/__init__.py
    sed -i "s/^mmcv_maximum_version = .*/mmcv_maximum_version = '1.7.2'/" "$INIT"
fi
