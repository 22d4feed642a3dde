# Two commands are enough on a machine with nothing but Python 3.11 or newer:
#   make demo   runs the whole chain on real data and a real model
#   make test   runs the tests
# Each makes its own .venv and installs all it needs.

PYTHON ?= python3
BIN := .venv/bin
TREES := toolkit commands selectors experts registry
# The editable install links files one by one: a folder that gained or lost a file is installed again.
FOLDERS := $(shell find $(TREES) -type d -not -name __pycache__)

# Idle OpenMP threads that spin make small steps crawl when the cores are busy.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test reliability check format bench clean

help:
	@echo "make demo | test | reliability | check | bench | format | clean"

.venv/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xpert needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

# The three data packages state dependencies that xpert does not use: they are installed without them.
.venv/packages: .venv/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[serve,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r demo-packages.txt
	touch $@

.venv/xpert: .venv/packages $(FOLDERS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --editable .
	touch $@

demo: .venv/xpert
	$(BIN)/xpert demo

test: .venv/xpert
	$(BIN)/python -m pytest

# The crash, concurrency and corruption tests at full count, ten minutes of mixed load on a server, and a long fuzzing of its
# description: some forty minutes.
reliability: .venv/xpert
	XPERT_RELIABILITY=full $(BIN)/python -m pytest tests/registry/test_reliability.py \
		tests/serving/test_server_reliability.py tests/serving/clients/test_schemathesis.py

check: .venv/xpert
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p xpert
	$(BIN)/mypy tests benchmarks $(wildcard examples)

format: .venv/xpert
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/xpert
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
