# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. The first one you call creates .venv, installs the pinned dependencies and builds the
# native module; after that only what changed is done again.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DATA ?=
ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build quickstart pretrained reproduce test test-all test-ray test-vllm lint format docs bench bench-quick gpu sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# ------------------------------------------------------------------ environment

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package is built without isolation, from the pinned build requirements. pip would compile what it installs on one
# core, which takes as long as all else; what cannot be compiled (a template, say) is no fault.
$(INSTALLED): pyproject.toml constraints.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c constraints.txt setuptools ninja
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

$(BUILT): $(INSTALLED) $(wildcard csrc/*)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

build: $(BUILT) ## create .venv and build the native module

# ------------------------------------------------------------------ use

# Threads that wait at a barrier sleep: by default they spin, and where another process has the core that they wait for,
# all the time is theirs.
quickstart pretrained reproduce: export OMP_WAIT_POLICY ?= passive

quickstart: $(BUILT) ## train, evaluate and recommend in minutes; DATA=folder for real data
	$(BIN)/python recipes/quickstart.py $(if $(DATA),--data $(DATA))

pretrained: $(BUILT) ## fetch a 135M language model, fine-tune and evaluate it; DATA=path/to/ml-100k, ARGS=--fetch_only
	$(BIN)/python recipes/pretrained.py $(if $(DATA),--data $(DATA)) $(ARGS)

reproduce: $(BUILT) ## the paper's tables and figures at small scale; DATA=path/to/ml-100k, ARGS='--table 2 --dry_run'
	$(BIN)/python recipes/reproduce.py --data $(or $(DATA),synthetic) $(or $(ARGS),--table 1 2 3 4 all --figure 1 2 5 6 7 8)

bench: $(BUILT) ## run every benchmark script; tables go to runs/bench
	for script in bench/bench_*.py; do $(BIN)/python $$script || exit; done

bench-quick: export OMP_NUM_THREADS = 1
bench-quick: $(BUILT) ## run the small suites in two minutes; PYTEST_ARGS=--benchmark-save=NAME
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

# ------------------------------------------------------------------ checks

# Two worker processes of one thread each: tests that are about threads set the number themselves. Each gets half of the
# tests, neighbours together, and then what the other has not begun. What a GPU computes is tested by `make gpu`: here
# there is none, and Triton's kernels are interpreted, on any machine.
test test-all: export CUDA_VISIBLE_DEVICES =
test: export OMP_NUM_THREADS = 1
test: $(BUILT) ## run the tests, but for the slow ones and those for a GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu' $(PYTEST_ARGS)

test-all: export OMP_NUM_THREADS = 1
test-all: $(BUILT) ## run the slow tests too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu' $(PYTEST_ARGS)

# An environment of its own: Ray brings much that nothing else here needs.
RAY := build/ray
RAY_NEEDS := 'ray[data]' torch numpy transformers tokenizers safetensors accelerate pyarrow tqdm pytest hypothesis psutil
test-ray: export OMP_NUM_THREADS = 1
test-ray: $(BUILT) ## optional: install Ray in build/ray and kill recipes/batch_ray.py's actors and driver
	test -x $(RAY)/bin/pytest || { $(BIN)/python -m venv $(RAY) && $(RAY)/bin/python -m pip install -c constraints.txt $(RAY_NEEDS); }
	PYTHONPATH=. $(RAY)/bin/python -m pytest tests/recipes/test_batch_ray.py $(PYTEST_ARGS)

# vLLM pins other versions of torch and transformers than .venv has, and is some gigabytes: an environment of its own.
VLLM_INSTALLED := $(VLLM_VENV)/.installed
$(VLLM_INSTALLED): constraints-vllm.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VLLM_INSTALLED) ## optional: the tests and the benchmark of the vLLM plugin, in .venv-vllm, which it makes (4 GB)
	$(VLLM_VENV)/bin/python -m pytest tests/serving/vllm $(PYTEST_ARGS)
	$(VLLM_VENV)/bin/python bench/bench_vllm.py

lint: $(INSTALLED) ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write docs/api.md from the docstrings
	$(BIN)/python docs/generate_api.py

# On a machine without a network: python3 bench/gpu.py, which builds and runs with the packages that Python has.
gpu: $(BUILT) ## build, test, sanitize and measure on a GPU; without one a dry run on the CPU; GPU_ARGS=--list
	$(BIN)/python bench/gpu.py $(GPU_ARGS)

# The package is built a second time, beside the first, and found first; nothing in .venv changes.
SANITIZE := build/sanitize
SANITIZED_TESTS := tests/ops/test_native.py tests/ops/test_span_attention_native.py tests/test_fuzz.py tests/test_fuzz_memory.py tests/batch/test_training_layout.py
FUZZ_CALLS ?= 100000
SANITIZER_FLAGS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
# CXXFLAGS is not a variable of the target: its prerequisite, the ordinary build, would inherit it. libstdc++ is loaded
# up front too: ASan must find it before torch throws its first exception.
# --capture=sys leaves the reports of ASan and UBSan on the terminal.
sanitize: $(BUILT) ## run the tests of native code, and CUDA's on the host, under ASan and UBSan
	CXXFLAGS='$(SANITIZER_FLAGS)' PATCHKERN_CUDA=0 $(BIN)/python setup.py -q build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PATCHKERN_FUZZ_CALLS=$(FUZZ_CALLS) \
	PYTHONPATH=$(SANITIZE)/lib:.:tests $(BIN)/pytest -o pythonpath= --capture=sys -n 2 $(SANITIZED_TESTS) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m slow tests/ops/test_pool_rows_cuda.py -k sanitizers

clean: ## remove what was built; .venv stays
	rm -rf build dist patchkern.egg-info patchkern/_native.*.so patchkern/_cuda.*.so patchkern/_build_info.json $(BUILT)
