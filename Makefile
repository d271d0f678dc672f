# `make help` says what each target does. Everything is installed in $(VENV); stamps make a second run install nothing.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
BIN := $(abspath $(VENV))/bin
SITE = $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-full lint bench aot simt cuda gpu gpu-bundle wheel sanitize clean

# The choice of torch outlives the call that made it: it changes only when TORCH is given and differs.
ifneq ($(strip $(TORCH)),)
$(shell mkdir -p $(VENV); echo '$(TORCH)' | cmp -s - $(VENV)/torch-choice || echo '$(TORCH)' > $(VENV)/torch-choice)
endif
TORCH_CHOICE := $(wildcard $(VENV)/torch-choice)

help:  ## show this list
	@echo "fastdit: make <target>"
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@echo 'options: TORCH="torch==2.12.0" (another torch), TORCH=keep (the one that $$(PYTHON) imports), PYTHON=, VENV=, ARGS='

setup: $(VENV)/installed  ## make .venv: pinned dependencies, then the package built from source

demo: setup  ## accelerate a real DiT and a real video VAE, write out/demo/report.html (under 4 minutes)
	$(BIN)/fastdit demo $(ARGS)

test: setup  ## the tests that CI runs, a process per core, with a ledger of where the time went
	.ci/test $(BIN)/python "not full and not gpu" $(ARGS)

test-full: setup  ## every test that needs no GPU, slow rows too
	.ci/test $(BIN)/python "not gpu" $(ARGS)

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

bench: setup  ## throughput against the peers on this machine, into build/bench/
	mkdir -p build/bench
	$(BIN)/fastdit bench --json build/bench/results.json --html build/bench/results.html $(ARGS)

# With the Triton of torch's current CUDA build and with the oldest one that is supported.
OLD_TRITON := build/triton-3.6.0
aot: setup $(OLD_TRITON)/installed  ## build every Triton kernel for sm_80, 90, 100 and 120 and report what each one uses
	$(BIN)/fastdit aot --json build/aot/triton.json $(ARGS)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/fastdit aot --json build/aot/triton-3.6.0.json $(ARGS)

$(OLD_TRITON)/installed: $(VENV)/dependencies
	$(BIN)/pip install -q --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0
	@touch $@

simt: setup  ## the CUDA kernels on the CPU: the fault catalogue, then every test of the cuda backend in the block simulator
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not full" tests/test_simt*.py tests/test_*_cuda.py $(ARGS)

# nvcc fails on spills; the table is read off the machine code.
cuda: setup  ## build fastdit._cuda with nvcc (no GPU needed) and print what each kernel uses
	@export PATH="$$PATH:/usr/local/cuda/bin"; \
	if ! command -v nvcc > /dev/null; then echo "make cuda: no nvcc on this machine; nothing was built."; exit 0; fi; \
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DFASTDIT_CUDA=ON -DPython_EXECUTABLE=$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null; \
	$(BIN)/cmake --build build/cuda --target _cuda; \
	$(BIN)/python -m fastdit.testing.cuda_build build/cuda/_cuda.*.so

# Needs no network: where `make setup` has not run, it takes python3 as it is, and build/gpu-bundle if that is here.
gpu:  ## on a machine with an NVIDIA GPU: ceilings, tests, sanitizer, benchmarks, models (GPU_STAGE=...; under 10 minutes)
	.ci/gpu $(ARGS)

gpu-bundle:  ## what such a machine lacks, for python3.12: the compiled modules and wheels of peers, into build/gpu-bundle
	.ci/gpu-bundle

wheel: setup  ## build dist/*.whl and test it in a new environment outside the tree
	rm -rf dist
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	FASTDIT_WHEEL=$$(ls dist/*.whl) $(BIN)/python -m pytest tests/test_wheel.py
	@ls -l dist

KERNEL_TESTS = tests/test_contract.py tests/test_cpu_streams.py $(filter-out %_originals.py %_triton.py,$(foreach f,modulation rotary attention patch conv activation,$(wildcard tests/test_$(f)*.py)))
sanitize: setup  ## ASan and UBSan build of the module, then the kernel tests on it
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/sanitize/wheel -Cbuild-dir=build/sanitize/cmake \
	  -Ccmake.define.FASTDIT_SANITIZE=ON -Cinstall.strip=false .
	$(PYTHON) -m venv --clear --without-pip build/sanitize/venv
	cat $(VENV)/lib/python*/site-packages/kept-torch.pth 2>/dev/null > build/sanitize/dependencies.pth || true
	echo "$(SITE)" >> build/sanitize/dependencies.pth
	mv build/sanitize/dependencies.pth build/sanitize/venv/lib/python*/site-packages/
	$(BIN)/pip --python build/sanitize/venv/bin/python install -q --no-deps --ignore-installed build/sanitize/wheel/*.whl
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  build/sanitize/venv/bin/python -m pytest -m "not full and not gpu and not big" $(KERNEL_TESTS) $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist out

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/dependencies: requirements-dev.txt $(TORCH_CHOICE) $(VENV)/build-tools
	@case "$$(cat $(VENV)/torch-choice 2>/dev/null)" in \
	  "") $(BIN)/pip install -r requirements-dev.txt ;; \
	  keep) $(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))" > "$(SITE)/kept-torch.pth" ; \
	    grep -vE '^(torch|triton|numpy)==' requirements-dev.txt | $(BIN)/pip install -r /dev/stdin ;; \
	  *) grep -vE '^(torch|triton)==' requirements-dev.txt | $(BIN)/pip install -r /dev/stdin $$(cat $(VENV)/torch-choice) ;; \
	esac
	@touch $@

# The compilers need none of the large packages: under `make -j2 setup` they run while pip unpacks those.
$(VENV)/build-tools: requirements-dev.txt | $(VENV)/bin/python
	grep -E '^(scikit-build-core|pybind11|cmake|ninja)==' requirements-dev.txt | $(BIN)/pip install -r /dev/stdin
	@touch $@

$(VENV)/built: $(VENV)/build-tools $(SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/installed: $(VENV)/dependencies $(VENV)/built
	@touch $@
