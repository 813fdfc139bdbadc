# make run    serve a demo disk                       make lint   ruff, mypy, import contracts
# make test   everything needed, then all tests       make bench  compare with other servers
# make venv   only the environment                    make clean  remove the environment and the caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --no-input --retries 10 \
	install --quiet --constraint tools/constraints.txt

export PYTHON

.PHONY: venv run test lint format bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml tools/constraints.txt
	PYTHON=$(PYTHON) tools/prerequisites venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nbdvde needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools
	$(PIP) --no-build-isolation --group test --group lint --editable .
	touch $@

run: venv
	@tools/demo

test: venv
	tools/prerequisites test
	-tools/later-debian >/dev/null
	-tools/debian-kernel >/dev/null
	-tools/raft-vectors >/dev/null
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: venv
	tools/prerequisites bench
	$(BIN)/python -m tools.bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
