# The commands of this project. `make` alone lists them.
#
#   PYTHON     interpreter to create the environment with; the pinned versions need 3.11 or newer
#   PIP_ARGS   further arguments for pip, such as an index with the torch build for your machine

PYTHON ?= python3
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# At most four workers, since each loads torch and diffusers, about 1.5 GB.
PYTEST := $(BIN)/pytest -q --numprocesses=logical --maxprocesses=4 --dist=worksteal
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test unit lint check fix bench matrix clean

help:
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP)  ## draw pictures with and without adapters
	$(BIN)/diffadapt demo

test: $(STAMP)  ## run the tests
	$(PYTEST)

unit: $(STAMP)  ## run the tests that need no whole pipeline, compiled model or other process
	$(PYTEST) -m "not slow"

lint: $(STAMP)  ## run the linters and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

check: lint test  ## run everything that a change has to pass

fix: $(STAMP)  ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## measure speed against the peer libraries
	@for script in scripts/bench_*.py; do $(BIN)/python $$script || exit 1; done

matrix: $(STAMP)  ## generate docs/compatibility.md: files of every family, dialect and type, here and in diffusers
	$(BIN)/python -m scripts.compat_matrix

clean:  ## delete the environment, caches and build output
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and alone, so that later installs find it and do not replace it by another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("make needs PYTHON=<3.11 or newer>" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt "$(TORCH)"
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e ".[quant,test,train]"
	@touch $@
