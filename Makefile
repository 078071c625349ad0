# Everything below sets itself up: it needs Python 3.11 or newer with pip, and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# The tested pair. On Linux these wheels bring several GB of CUDA packages; for PyTorch's CPU build name its index:
#   make test TORCH="--index-url INDEX torch torchvision"
TORCH ?= torch==2.14.1 torchvision==0.29.1
QUICKSTART ?= quickstart
# Tests that the lowest supported versions of all packages have to pass.
LOWEST_TESTS := tests/core tests/config tests/data tests/models tests/attacks/test_pixel.py tests/attacks/test_lavan.py \
	tests/attacks/test_patch.py tests/quant/test_convert.py tests/quant/test_channels.py \
	tests/quant/test_conversion_refusals.py tests/quant/test_calibrate.py tests/quant/test_freeze.py \
	tests/quant/test_switch.py tests/quant/test_double_backward.py tests/training/test_loop.py tests/evaluation/report \
	tests/cli/test_main.py tests/cli/test_list.py tests/cli/test_recipes.py tests/cli/test_convert.py

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := $(BIN)/qadtr-brevitas
IN_PARALLEL := --numprocesses logical --dist loadscope --no-loadscope-reorder

# More OpenMP threads than free cores slow small networks down by far.
quickstart test test-fast test-lowest test-ray bench judges sweep: export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-fast test-lowest test-ray compilers lint types docs bench judges sweep format clean
.DEFAULT_GOAL := help

help: ## show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED) ## train, attack and compare two small networks, no download (about 4 minutes)
	$(RUN) train digits_qat -o $(QUICKSTART)/qat
	$(RUN) train digits_qadtr -o $(QUICKSTART)/qadtr
	$(RUN) attack $(QUICKSTART)/qat steps=100 batch_size=32 --target 3,8 -o $(QUICKSTART)/qat/patches
	$(RUN) attack $(QUICKSTART)/qadtr steps=100 batch_size=32 --target 3,8 -o $(QUICKSTART)/qadtr/patches
	$(RUN) evaluate $(QUICKSTART)/qat $(QUICKSTART)/qadtr --transfer float -o $(QUICKSTART)/report

test: $(INSTALLED) ## run all tests, a process for each core; PYTEST_ARGS adds options
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## run the tests that take less than a second each (under two minutes)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" $(PYTEST_ARGS)

# Old packages warn about the newest releases of what they need.
test-lowest: .venv-lowest/.installed ## run a selection of tests with the lowest supported version of every package
	.venv-lowest/bin/python -m pytest $(IN_PARALLEL) -W ignore::DeprecationWarning \
		-W ignore::UserWarning $(LOWEST_TESTS)

test-ray: $(VENV)/.ray ## run the tests on real Ray clusters, whose nodes need the cores for themselves
	$(BIN)/python -m pytest tests/reproduce/study/test_ray.py tests/test_examples.py::test_a_study_runs_on_a_cluster

compilers: .venv-finn/.installed .venv-hls4ml/.installed ## install FINN and hls4ml, for estimates and their tests (1.1 GB)

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## check types, strictly
	$(BIN)/pyright

docs: $(INSTALLED) .venv-docs/.installed ## build the documentation site into site/; a warning is an error
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

bench: $(INSTALLED) ## measure speed and memory against the float model, stock Brevitas and ART
	$(BIN)/python benchmarks/benchmark.py --output bench.json
	$(BIN)/python benchmarks/benchmark_attacks.py --output bench_attacks.json
	$(BIN)/python benchmarks/benchmark_ptq.py --output bench_ptq.json
	$(BIN)/python -m benchmarks.benchmark_quantizers --output bench_quantizers.json
	$(BIN)/python benchmarks/benchmark_export.py --output bench_export.json
	$(BIN)/python benchmarks/benchmark_certify.py --output bench_certify.json
	$(BIN)/python -m benchmarks.benchmark_input --output bench_input.json
	$(BIN)/python -m benchmarks.benchmark_networks --fused --qadtr --compile --output bench_resnet20.json
	$(BIN)/python -m benchmarks.benchmark_networks --threads 2 --fused --alone --output bench_resnet20_2_threads.json
	$(BIN)/python -m benchmarks.benchmark_networks --network resnet50 --batch 16 --rounds 3 --fused --output bench_resnet50.json
	$(BIN)/python -m benchmarks.benchmark_networks --network deit_small_patch16_224 --batch 16 --rounds 3 --fused --output bench_deit_small.json
	$(BIN)/python -m benchmarks.benchmark_ddp --output bench_ddp.json

judges: $(INSTALLED) ## have FINN, hls4ml, qonnx and onnxruntime try exports of published networks (hours)
	$(BIN)/python -m benchmarks.benchmark_judges --output bench_judges.json

sweep: $(INSTALLED) ## convert and check the smallest network of every timm module (about an hour on one core)
	$(BIN)/python -m benchmarks.timm_sweep --table docs/timm.md

format: $(INSTALLED) ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and build outputs; keeps runs
	rm -rf $(VENV) .venv-finn .venv-hls4ml .venv-lowest .venv-docs site build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip knows dependency groups from 25.1 on.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	touch $@

$(VENV)/.ray: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[ray]"
	touch $@

# uv installs these gigabytes in half the time that pip needs.
.venv-lowest/.installed: requirements/lowest.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python -r requirements/lowest.txt
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --no-deps --editable .
	touch $@

.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r requirements/docs.txt
	touch $@

# The compilers pin versions of their own, and need neither torch nor this package.
.venv-finn/.installed: requirements/finn.txt requirements/finn-own.txt
	$(PYTHON) -m venv .venv-finn
	.venv-finn/bin/python -m pip install --quiet -r requirements/finn.txt
	.venv-finn/bin/python -m pip install --quiet --no-deps -r requirements/finn-own.txt
	touch $@

.venv-hls4ml/.installed: requirements/hls4ml.txt
	$(PYTHON) -m venv .venv-hls4ml
	.venv-hls4ml/bin/python -m pip install --quiet -r requirements/hls4ml.txt
	touch $@
