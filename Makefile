# Everything here works from a fresh clone, as root or as a user, without a GPU and, after the install, without a network.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DEMO_ROUTING ?= reroute-pdrop:avg=1/9

.PHONY: demo test lint format types venv check-runtime check-tensorrt check-gpu bindings benchmark kernels

venv: $(STAMP)

# Runs again when the requirements change. PIP_ARGS is for an index, for example
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" (see CONTRIBUTING.md).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		-c constraints.txt -e ".[export,build,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/reroute export demo/model -o out/demo-export --routing "$(DEMO_ROUTING)" --force
	$(BIN)/reroute build out/demo-export -o out/demo --force
	$(BIN)/python -m reroute.demo.answer_demo out/demo --picture out/demo.png

test: $(STAMP) bindings
	$(BIN)/python -m pytest

# TensorRT's and CUDA's Python bindings (24 MiB, no libraries) into .venv/bindings, once, where the index has them: the
# tests look there for every name that our code says to TensorRT. Without them those tests skip, and say so.
bindings: $(STAMP)
	-@$(BIN)/python -m tests.engines.bindings

# The same tests, but what is missing is a failure.
check-tensorrt: bindings
	REROUTE_BINDINGS=required $(BIN)/python -m pytest tests/engines/test_bindings.py

# All rungs that need a GPU, in order; stops at the first that fails. Needs CUDA, `pip install onnxruntime-gpu` in place of
# onnxruntime, and for the last three lines TensorRT (`pip install -e ".[tensorrt]"`) and its headers. Jetson:
# make check-gpu CUDA_PRESET=orin-native TARGET=orin-jp6 TRT_INCLUDE_DIR=/usr/include/aarch64-linux-gnu
CUDA_PRESET ?= x86_64-cuda13
TARGET ?= datacenter
TRT_INCLUDE_DIR ?= /usr/include/x86_64-linux-gnu
KERNELS := out/plugins/$(CUDA_PRESET)
check-gpu: $(STAMP)
	cd plugins_cpp && cmake --preset $(CUDA_PRESET) -DTRT_INCLUDE_DIR=$(TRT_INCLUDE_DIR)
	cd plugins_cpp && cmake --build --preset $(CUDA_PRESET) && ctest --preset $(CUDA_PRESET)
	mkdir -p out/gpu && $(KERNELS)/reroute_kernel_check --benchmark > out/gpu/kernels.json
	$(BIN)/reroute export demo/model -o out/gpu/export --routing "$(DEMO_ROUTING)" --force
	$(BIN)/reroute build out/gpu/export -o out/gpu/ort --force
	$(BIN)/reroute check out/gpu/ort --provider cuda
	$(BIN)/reroute build out/gpu/export -o out/gpu/native --backend tensorrt --target $(TARGET) --form native --force
	$(BIN)/reroute build out/gpu/export -o out/gpu/plugin --backend tensorrt --target $(TARGET) --force \
		--plugin $$(ls $(KERNELS)/libreroute_tensorrt*.so)
	$(BIN)/reroute check out/gpu/native && $(BIN)/reroute check out/gpu/plugin

# The demo bundle against its recorded reference with nothing but the runtime installed: PYTHON=python3.10 make check-runtime
check-runtime:
	rm -rf out/runtime-venv
	$(PYTHON) -m venv out/runtime-venv
	out/runtime-venv/bin/python -m pip install --quiet --disable-pip-version-check ".[ort]" polygraphy
	out/runtime-venv/bin/reroute doctor
	out/runtime-venv/bin/reroute check out/demo

# Speed and size against others and against the aims, on an otherwise idle machine: about an hour. benchmarks/README.md says
# what must be installed: the authors' code with transformers 5.4.0, onnxruntime-genai and llama-cpp-python, and
# onnxruntime-genai's model builder. BENCHMARK_ARGS goes to every script, for example "--repeat 5".
# "+kernels" is a profile built with `reroute build --kernels`; `make kernels` builds the library for this machine.
PROFILES ?= fp32
BENCHMARK_ARGS ?=
AUTHORS ?= out/benchmark/mllm-reroute
AUTHORS_TRANSFORMERS ?= out/benchmark/transformers-5.4.0
PEERS ?= out/benchmark/peers-venv/bin/python
BUILDER ?= out/benchmark/builder-venv/bin/python
MEASURE = $(BIN)/python -m benchmarks.
benchmark: $(STAMP)
	$(MEASURE)footprint --profiles $(PROFILES) $(BENCHMARK_ARGS)
	$(MEASURE)prefill --profiles $(PROFILES) --authors $(AUTHORS) --transformers $(AUTHORS_TRANSFORMERS) $(BENCHMARK_ARGS)
	$(MEASURE)costs --profiles $(PROFILES) $(BENCHMARK_ARGS)
	$(MEASURE)decode --profiles $(PROFILES) --peers $(PEERS) --builder $(BUILDER) $(BENCHMARK_ARGS)
	$(MEASURE)scaling --profiles $(PROFILES) $(BENCHMARK_ARGS)
	$(MEASURE)summary

# out/plugins/cpu/libreroute_onnxruntime.so, for `reroute build --profile int8 --kernels`: CMake and a C++17 compiler.
kernels:
	cd plugins_cpp && cmake --preset cpu && cmake --build --preset cpu --target reroute_onnxruntime

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/pyright
