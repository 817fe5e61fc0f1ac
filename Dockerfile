# Python 3.10, torch 2.1.0, CUDA 12.1, triton 3.0.0, mmcv-full 1.7.2 with CUDA operators, mmdet 2.28.2, mmdet3d 1.0.0rc6, spconv, and
# this package. Build: docker build -t flashbias .        Use: docs/guides/deployment.md
FROM nvidia/cuda:12.1.1-cudnn8-devel-ubuntu22.04
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN apt-get update && apt-get install -y --no-install-recommends python3.10 python3.10-dev python3.10-venv git ninja-build libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* && python3.10 -m venv /opt/venv
WORKDIR /flashbias_patch
COPY . .
RUN environments/mmdet3d-v1.sh
