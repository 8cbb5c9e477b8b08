# Everything here works from a fresh clone, as root or as a user, without a GPU and, after the install, without a network.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DEMO_ROUTING ?= reroute-pdrop:avg=1/9

.PHONY: demo test lint format types venv check-runtime check-tensorrt bindings

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

# The demo bundle against its recorded reference with nothing but the runtime installed: PYTHON=python3.10 make check-runtime
check-runtime:
	rm -rf out/runtime-venv
	$(PYTHON) -m venv out/runtime-venv
	out/runtime-venv/bin/python -m pip install --quiet --disable-pip-version-check ".[ort]" polygraphy
	out/runtime-venv/bin/reroute doctor
	out/runtime-venv/bin/reroute check out/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/pyright
