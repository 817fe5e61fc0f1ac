# `make demo` and `make test` set up what they need in .venv. See README.md.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
FRAME ?= $(wildcard ../shared/data/nuscenes_frame)
JOBS ?= 2
DEMO ?= runs/demo
# The core, in parts: other versions of torch run those that they are given.
failures := tests/attention/recovery tests/attention/backends/test_upstream_flashbias.py tests/integration/distributed \
	$(patsubst %,tests/attention/test_%.py,dispatch kept_verdicts selfcheck)
alone := tests/attention/backends/test_flash_attention.py tests/attention/kernels/test_concatenate.py  # with one torch
attention := $(filter-out $(failures) $(alone),$(wildcard tests/attention/test_*.py tests/attention/backends/test_*.py))
bias := tests/bias
family := tests/compat tests/family
kernels := $(filter-out $(alone),$(wildcard tests/attention/kernels/test_*.py))
patching := tests/maps tests/monitor/test_finite.py tests/patching
PARTS ?= attention bias failures family kernels patching
CORE = $(foreach part,$(PARTS),$($(part)))
export OMP_NUM_THREADS ?= 2

.PHONY: help demo test test-slow test-gpu test-openmmlab test-py38 test-old test-torch test-triton lint package docs clean

help:
	@echo "make demo            unpatched against patched: trains examples/mini_cmt both ways, writes $(DEMO)/report.html"
	@echo "make test            the default tests"
	@echo "make test-slow       the heavier tiers: Triton's interpreter, browser, long trainings"
	@echo "make test-gpu        the tests that need a CUDA GPU, on it; the others never use one"
	@echo "make test-openmmlab  integration with real mmcv, mmdet3d and mmengine (builds .venv-openmmlab)"
	@echo "make test-py38       the core under Python 3.8, torch 2.1 and wrapt 1.14"
	@echo "make test-old        seams, checkpoints and the family under torch 1.9 (Python 3.8) and 1.13 (Python 3.10)"
	@echo "make test-torch      the core under torch 2.6 (Python 3.13) and the newest"
	@echo "make test-triton     the kernels compiled by several versions of Triton, without a GPU"
	@echo "make lint            ruff (rules and format), mypy, the import contract and no private names in tests"
	@echo "make package         wheel and sdist, checked, installed in a fresh environment and smoke-tested"
	@echo "make docs            the site, into site/: fails on a dead link or an undocumented public name"

$(VENV)/ready: setup.py
	@echo "Setting up $(VENV), once: 2 to 10 minutes, most of it for the download of PyTorch. 1 of 4: a new environment"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "2 of 4: $(TORCH)"
	@$(BIN)/pip install --disable-pip-version-check $(TORCH)
	@echo "3 of 4: this package, and what its tests and its demo need"
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -e ".[demo,test,lint]"  # `make package` fails on a build's warnings
	@echo "4 of 4: Triton"
	@$(BIN)/pip install --quiet triton
	@touch $@

demo: $(VENV)/ready
	@echo "Demo: examples/mini_cmt is trained four times for 40 steps: 2 to 5 minutes on two cores"
	$(if $(filter runs/demo,$(DEMO)),rm -rf runs/demo)
	$(BIN)/flashbias ab --repeats 1 --steps 40 --warmup 8 --out $(DEMO) -- \
		$(BIN)/python examples/mini_cmt/tools/train.py --steps 40 --dropout 0 --no-cp $(if $(FRAME),--frame $(FRAME))

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not browser and not openmmlab"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -n $(JOBS) -m "(slow or browser) and not openmmlab"

test-gpu: $(VENV)/ready
	TEST_ON_GPU=1 $(BIN)/python -m pytest -q -m gpu

test-triton:
	tools/triton_matrix.sh

test-openmmlab: ENVS ?= v1 v2
test-openmmlab:
	tools/openmmlab_env.sh $(ENVS)
	for env in $(ENVS); do .venv-openmmlab/$$env/bin/python -m pytest -q -m openmmlab tests/integration/openmmlab || exit 1; done

test-py38:
	tools/openmmlab_env.sh py38
	.venv-openmmlab/py38/bin/python -m pytest -q -n $(JOBS) tests/test_settings.py $(attention) $(bias) $(family) $(patching)

# What needs no more of torch than 1.9 has: seams, checkpoints with a learned bias, the family's stand-ins, the monitor.
OLD := tests/attention/backends/test_sdpa_and_reference.py tests/family/test_family.py \
	$(filter-out tests/monitor/test_finite.py,$(wildcard tests/monitor/test_*.py)) tests/patching/test_bias_ways.py \
	tests/patching/test_checkpoints.py tests/patching/test_inner_attention.py tests/patching/test_functional_attention.py
test-old: ENVS ?= t19 t113
test-old:
	tools/openmmlab_env.sh $(ENVS)
	for env in $(ENVS); do .venv-openmmlab/$$env/bin/python -m pytest -q -n $(JOBS) -m "not slow and not browser" $(OLD) || exit 1; done

test-torch: ENVS ?= mid v2
test-torch:
	tools/openmmlab_env.sh $(ENVS)
	for env in $(ENVS); do .venv-openmmlab/$$env/bin/python -m pytest -q -n $(JOBS) -m "not slow and not browser" $(CORE) || exit 1; done

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py
	$(BIN)/python tools/check_private_names.py

package: $(VENV)/ready
	tools/check_package.sh $(BIN)/python

# An environment of its own, without PyTorch: the reference is read from the source.
.venv-docs/ready: setup.py
	$(PYTHON) -m venv .venv-docs
	PYTHONWARNINGS=ignore .venv-docs/bin/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

docs: .venv-docs/ready
	FLASHBIAS_PATCH=0 NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-docs .venv-openmmlab .venv-triton build dist site *.egg-info runs
