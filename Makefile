# make demo   run the 9-edge digits setup: cloned KD, then Flower's FedAvg and FedProx
# make test   ruff, mypy --strict and the tests, but those marked slow, gpu or deployment
# make quick  the tests that start no Flower processes
# make docs    the documentation site in site/; a broken link or a failing cell of the tutorial is an error
# make deployment   the tests with SuperLink and SuperNodes; 5 minutes, not part of make test

PYTHON ?= python3
BIN := .venv/bin
QUICK := not simulation and not deployment and not gpu and not slow
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test quick docs deployment clean

# One thread: a second gains nothing on so small a model, and costs tenfold where others use the CPU.
demo: .venv/.demo
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/run.py quickstart_digits \
		--run-config "strategy='cloned-kd,fedavg,fedprox'"

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "$(QUICK)" --numprocesses 2 --durations=5
	$(BIN)/python -m pytest -m "simulation and not slow" --durations=5

deployment: .venv/.dev
	$(BIN)/python -m pytest -m deployment --durations=5

quick: .venv/.dev
	$(BIN)/python -m pytest -m "$(QUICK)" --numprocesses 2

docs: .venv/.dev
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version); try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(PIP_INSTALL) --editable ".[simulation,digits,plots]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: PyTorch alone is some gigabytes, this takes minutes"
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ .venv/.demo

clean:
	rm -rf .venv results site
