# make demo   run the 9-edge digits setup: cloned KD, then Flower's FedAvg and FedProx
# make test   ruff, mypy --strict and the tests, but those marked slow, gpu or deployment
# make quick  the tests that start no Flower processes
# make dist   build the wheel and the sdist into dist/
# make package   make dist, and the tests that install the wheel outside this folder; part of make test
# make docs    the documentation site in site/; a broken link or a failing cell of the tutorial is an error
# make deployment   the tests with SuperLink and SuperNodes; 5 minutes, not part of make test

PYTHON ?= python3
BIN := .venv/bin
QUICK := not simulation and not package and not deployment and not gpu and not slow
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
# The tests start processes of their own, and two threads in each of them slow all down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Versions that have wheels for this Python; matplotlib-venn has none.
LOWEST := --resolution lowest-direct --only-binary :all: --no-binary matplotlib-venn

.PHONY: demo test quick docs dist package deployment clean

# One thread: a second gains nothing on so small a model, and costs tenfold where others use the CPU.
# The clones of an edge train on a thread each.
demo: .venv/.demo
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/run.py quickstart_digits \
		--run-config "strategy='cloned-kd,fedavg,fedprox' workers=2"

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "$(QUICK)" --numprocesses 2 --durations=5
	$(PYTEST) -m "simulation and not slow" --durations=5
	$(MAKE) --no-print-directory package

deployment: .venv/.dev
	$(PYTEST) -m deployment --durations=5

dist: .venv/.dist
	rm -rf dist
	$(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python

package: .venv/.dev dist
	$(PYTEST) -m package --durations=5

# What the lower bounds of pyproject.toml mean for this Python, and no constraint at all.
constraints-lowest.txt: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet $(LOWEST) --python $(BIN)/python --extra simulation --extra launch \
		--extra digits --extra plots --extra datasets --extra report --extra tensorboard \
		--extra wandb --extra mlflow --output-file $@ pyproject.toml

constraints-newest.txt:
	touch $@

quick: .venv/.dev
	$(PYTEST) -m "$(QUICK)" --numprocesses 2

docs: .venv/.dev
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	@echo "Installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(PIP_INSTALL) --editable ".[simulation,digits,plots,report]"
	@touch $@

.venv/.dev: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	@echo "Installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ .venv/.demo .venv/.dist

.venv/.dist: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(PIP_INSTALL) hatchling uv
	@touch $@

clean:
	rm -rf .venv dist results site
