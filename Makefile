# Every target does all its set-up; the first one downloads what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    run the shop: PostgreSQL, web workers and a poller (PORT=8000)"
	@echo "make test    run the whole test suite"
	@echo "make lint    run ruff, mypy and import-linter"
	@echo "make bench   compare with other engines; writes benchmarks/RESULTS.md (QUICK=1: does not)"
	@echo "make clean   remove the environment and what the tools keep"

demo: $(VENV)/.demo
	@$(BIN)/python -m testproject.demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	DATABASE_URL=postgresql://unused/unused $(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m testproject.embedded $(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(ARGS)

clean:
	rm -rf $(VENV) .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.installer: constraints.txt
	@echo "Setting up $(VENV) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --upgrade --quiet pip
	@touch $@

$(VENV)/.demo: $(VENV)/.installer pyproject.toml
	@echo "Downloading what the demonstration needs …"
	@$(BIN)/python -m pip install --constraint constraints.txt --progress-bar on --editable . --group demo
	@touch $@

$(VENV)/.dev: $(VENV)/.installer pyproject.toml
	@echo "Downloading what the tests need …"
	@$(BIN)/python -m pip install --constraint constraints.txt --progress-bar on --editable . --group dev
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.dev
	@echo "Downloading what the measurements compare with …"
	@$(BIN)/python -m pip install --constraint constraints.txt --progress-bar on --group bench
	@touch $@
