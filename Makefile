# The commands of this project. `make` alone lists them.
#
#   PYTHON     interpreter to create the environment with; the pinned versions need 3.11 or newer
#   PIP_ARGS   further arguments for pip, such as an index with the torch build for your machine
#   PORT       port of `make serve`
#
# These three select another environment; `make test-oldest` and `make test-newest` set them:
#
#   VENV         folder of the environment
#   CONSTRAINTS  file with the versions to install
#   EXTRAS       optional dependencies to install

PYTHON ?= python3
PIP_ARGS ?=
PORT ?= 8000
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= docs,quant,serve,test,train

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# At most four workers, since each loads torch and diffusers, about 1.5 GB.
PYTEST := $(BIN)/pytest -q --numprocesses=logical --maxprocesses=4 --dist=worksteal
TORCH ?= $(shell sed -n 's/^\(torch[=<>][^ ;]*\).*/\1/p' $(CONSTRAINTS))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test unit lint docs check fix bench matrix dist test-oldest test-newest clean

help:
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(STAMP)  ## draw pictures with and without adapters
	$(BIN)/diffadapt demo

serve: $(STAMP)  ## serve the embedded pipeline at http://127.0.0.1:PORT, until Ctrl-C
	@exec $(BIN)/python -m examples.serving --port $(PORT)

test: $(STAMP)  ## run the tests
	$(PYTEST)

unit: $(STAMP)  ## run the tests that need no whole pipeline, compiled model or other process
	$(PYTEST) -m "not slow"

lint: $(STAMP) docs  ## run the linters and the type checker, and build the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: $(STAMP)  ## build the documentation in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

check: lint test  ## run everything that a change has to pass

fix: $(STAMP)  ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## measure speed against the peer libraries
	@for script in scripts/bench_*.py; do PYTHONPATH=. $(BIN)/python $$script || exit 1; done

matrix: $(STAMP)  ## generate docs/compatibility.md: files of every family, dialect and type, here and in diffusers
	$(BIN)/python -m scripts.compat_matrix

dist: $(STAMP)  ## build the wheel and the sdist in dist/, install both in new environments and try them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m scripts.try_dist dist/*.whl dist/*.tar.gz

test-oldest:  ## run the tests with the oldest supported versions (PYTHON=python3.10)
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=test,train

test-newest:  ## run the tests with the newest versions that install
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

clean:  ## delete the environments, caches and build output
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .ruff_cache build dist site demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and alone, so that later installs find it and do not replace it by another build.
$(STAMP): pyproject.toml $(CONSTRAINTS)
ifeq ($(CONSTRAINTS),constraints.txt)
	@$(PYTHON) -c 'import sys; sys.exit("make needs PYTHON=<3.11 or newer>" if sys.version_info < (3, 11) else 0)'
endif
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -c $(CONSTRAINTS) "$(TORCH)"
	$(BIN)/pip install $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@
