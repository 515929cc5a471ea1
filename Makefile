# From a fresh clone, with nothing installed by hand, no GPU and no nvcc. Every target may be run twice.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
RUN    ?= runs/demo
PYTEST_ARGS ?= -q

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
# One process each, so that no part depends on what another imported or set; as many at a time as there are processors.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
LONG   := tests/triton tests/codegen# begun first: they take longest
PARTS  := $(LONG) $(filter-out $(LONG),$(sort $(patsubst %/,%,$(dir $(wildcard tests/*/test_*.py)))))
# Stamps carry what they were made with, so that another torch or another kind of build is another stamp.
DEPS   := $(VENV)/.deps-$(subst =,-,$(TORCH))
BUILT  := $(VENV)/.built-$(or $(NVAE_FAST_BUILD),auto)
DEV    := $(VENV)/.dev
# Requirements as pyproject.toml lists them.
LIST    = $(BIN)/python -c 'import tomllib; t = tomllib.load(open("pyproject.toml", "rb")); print(*$(1))'

.PHONY: help install demo test soak gpu readme lint clean $(PARTS)

help:
	@echo "make install   $(VENV) with torch, the package (editable) and its native extension"
	@echo "make demo      install, then train, evaluate and sample the demo preset on the bundled images into $(RUN)"
	@echo "make test      install, then everything that CI runs: ruff and all tests"
	@echo "make soak      install, then kill a small training run 50 times and compare it with one that was left alone"
	@echo "make gpu COMMIT=id   on a machine with an NVIDIA GPU and nvcc: build, check and measure; no network, no git;"
	@echo "                     NVLABS=PATH measures a checkout of NVlabs/NVAE beside it"
	@echo "make readme    the README's tables again, from the newest results that git knows in benchmarks/results"
	@echo "make lint      ruff only"
	@echo "make clean     remove build products; $(VENV) and runs/ stay"
	@echo "Variables: PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) RUN=$(RUN) NVAE_FAST_BUILD=auto|cpu|cuda|none"
	@echo "CPU-only torch, a smaller download: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"

install: $(BUILT)

demo: install
	$(BIN)/nvae-fast train --preset demo --out $(RUN) --resume auto
	$(BIN)/nvae-fast evaluate $(RUN) --num-iw-samples 10
	$(BIN)/nvae-fast sample $(RUN) --out $(RUN)/samples.png
	$(BIN)/nvae-fast reconstruct $(RUN) --out $(RUN)/reconstructions.png
	$(BIN)/nvae-fast report $(RUN)
	$(BIN)/nvae-fast bench --suite step --preset demo --rounds 7 --no-compile

gpu:
	$(PYTHON) benchmarks/gpu.py --commit $(COMMIT) --out $(or $(OUT),benchmarks/results/gpu) $(if $(NVLABS),--nvlabs $(NVLABS))

readme: install
	$(BIN)/python -m nvae_fast.benchmarks.readme --write README.md

test: lint
	@$(MAKE) --no-print-directory --keep-going --output-sync=target --jobs=$(JOBS) $(PARTS)

$(PARTS):
	@echo "pytest $@"; OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS) $@

soak: install $(DEV)
	OMP_NUM_THREADS=1 NVAE_FAST_KILLS=50 $(BIN)/pytest $(PYTEST_ARGS) -s tests/training/test_signals.py -k random_moments

lint: install $(DEV)
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info nvae_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks $(VENV)/.built-*
	find nvae_fast kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' on PATH: install Python 3.11 or newer, or make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V): nvae_fast needs Python 3.11 or newer; make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEPS): pyproject.toml | $(BIN)/python
	$(PIP) "$(TORCH)" $$($(call LIST,t["build-system"]["requires"] + t["project"]["dependencies"]))
	@rm -f $(VENV)/.deps-* && touch $@

$(BUILT): $(DEPS) setup.py pyproject.toml $(NATIVE) $(wildcard benchmarks/__init__.py)
	@rm -f $(VENV)/.built-* nvae_fast/_C*.so
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(DEV): $(DEPS)
	$(PIP) "$(TORCH)" $$($(call LIST,t["project"]["optional-dependencies"]["dev"]))
	@touch $@
