# Everything runs in .venv, which every target creates if it is missing or out of date.
#   make setup PYTHON=/path/to/python3.12     to choose the interpreter
#   make setup TORCH_INDEX=URL                to install torch from a separate package index, such as PyTorch's for CPU builds
#   make test ARGS="tests/test_sequence.py"   to pass arguments to pytest

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
# Tests of one process run two at a time, those that start ranks one after the other. If ARGS names only tests of one kind, pytest finds
# none of the other kind and exits with code 5.
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo test test-all lint format bench docs clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## Create .venv with everything in it

demo: $(STAMP)  ## The whole pipeline at small scale: data, shards, training, evaluation, report
	$(BIN)/icl-moe demo $(ARGS)

test: $(STAMP)  ## The tests, without the slow ones
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not ranks" $(ARGS) || [ $$? = 5 ]
	$(PYTEST) -m "not slow and ranks" $(ARGS) || [ $$? = 5 ]

test-all: $(STAMP)  ## All tests
	$(PYTEST) -n 2 --dist loadfile --hypothesis-profile=new -m "not ranks" $(ARGS) || [ $$? = 5 ]
	$(PYTEST) --hypothesis-profile=new -m "ranks" $(ARGS) || [ $$? = 5 ]

lint: $(STAMP)  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure the time and memory of each stage
	$(BIN)/python benchmarks/line.py $(ARGS)

docs: $(STAMP)  ## Build the documentation site in site/
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info

# torch is installed first, so that no other package can install another build of it.
# A test compares the VQ-GAN with taming-transformers; its dependencies (pytorch-lightning, torchvision) are not needed for that.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[train,web,test,dev]'
	$(PIP) install -c constraints.txt --no-deps taming-transformers-rom1504
	touch $@

# A Python without ensurepip (Debian's, without python3-venv) can still create a venv and install pip there with its own pip. The
# interpreter is resolved to its path first: with .venv/bin on the PATH, its name would then mean the new one.
$(BIN)/python:
	@python="$$(command -v $(PYTHON))"; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed but was not found: install it, or name it with make setup PYTHON=/path/to/python3."; exit 2; fi; \
	"$$python" -m venv $(VENV) >/dev/null 2>&1 \
		|| { rm -rf $(VENV) && "$$python" -m venv --without-pip $(VENV) && "$$python" -m pip --python $@ install pip; } \
		|| { rm -rf $(VENV); echo "$$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu: apt-get install python3-venv)."; exit 2; }
