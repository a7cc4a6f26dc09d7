# agentd: `make` lists what can be done. Every target does its own set-up, once.

PYTHON ?= python3
PYTEST_ARGS ?=
CONFIG ?= configs/agentd.yaml

VENV := .venv
BIN := $(VENV)/bin
# changes when the environment has to be brought up to date
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model package demo demo-home demo-drift run quick test fleet-test bench check clean

help:
	@echo 'make setup   make .venv and install the pinned dependencies (compiles llama.cpp: some 5 minutes on 2 cores)'
	@echo 'make model   fetch the default model (93 MB, once per user)'
	@echo 'make demo    the whole loop on movie reviews: serve, feedback, learn, prove, swap, roll back'
	@echo 'make demo-home   the same with an agent in a small home, whose tool calls are corrected'
	@echo 'make demo-drift   a small int8 classifier, a camera that is turned, and feedback (DATA=folder of Fashion-MNIST)'
	@echo 'make run     run the daemon in the foreground      (CONFIG=configs/reviews.yaml; default configs/agentd.yaml)'
	@echo 'make quick   run the quick tests (under a minute; no model is needed)'
	@echo 'make test    run every test                        (PYTEST_ARGS="-k name -x" is passed on)'
	@echo 'make fleet-test   run the tests of agentd-flower in an environment of its own, flower/.venv (Python 3.11 or newer)'
	@echo 'make bench   list the benchmarks, or run one         (BENCH="engine --requests 30")'
	@echo 'make check   lint, formatting, types, import layers    (ruff, mypy --strict, import-linter)'
	@echo 'make package   a wheel, its sources, and a Debian package for this machine, in dist/'
	@echo 'make clean   remove .venv and caches; models and state stay where they are'
	@echo
	@echo 'PYTHON=python3.12 chooses another Python (3.10 to 3.13).'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 10) <= v <= (3, 13); sys.exit(0 if ok else "agentd needs Python 3.10 to 3.13; $(PYTHON) is %d.%d. Choose another: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'Could not make a virtual environment. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }

$(INSTALLED): constraints.txt pyproject.toml tools/setup.py | $(BIN)/python
	@$(BIN)/python tools/setup.py
	@touch $@

setup: $(INSTALLED)

# Returns at once when the model is there; it lies in the user's cache, which a stamp here would know nothing of.
model: $(INSTALLED)
	@$(BIN)/agentd --config $(CONFIG) fetch-model

demo: $(INSTALLED) model
	@$(BIN)/python -m tools.demo.reviews

demo-home: $(INSTALLED) model
	@$(BIN)/python -m tools.demo

# DATA=DIR names a folder with Fashion-MNIST's files.
demo-drift: $(INSTALLED)
	@$(BIN)/python -m tools.drift $(if $(DATA),--data $(DATA)) --plot drift.png

# Needs dpkg, and some 5 minutes: all dependencies are installed once more, into the package.
package: $(INSTALLED)
	@$(BIN)/python -m tools.package wheel
	@$(BIN)/python -m tools.package deb

run: $(INSTALLED) model
	@exec $(BIN)/agentd --config $(CONFIG) run

quick: $(INSTALLED)
	@$(BIN)/python -m pytest tests/unit --ignore tests/unit/ctl -m 'not slow and not model' -n 2 --dist worksteal -q $(PYTEST_ARGS)

# Trainers run at nice 19: beside tests at a higher priority they would get next to nothing of two cores. Three workers
# for two cores, because tests of daemons wait for clocks and processes much of their time. A worker that died is not
# replaced: its files are given out once more as units without a test, behind which the others may wait for ever.
test: $(INSTALLED) model
	@nice -n 19 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS)

FLOWER := flower/.venv/.installed

$(FLOWER): flower/pyproject.toml
	@$(PYTHON) -m venv flower/.venv
	@flower/.venv/bin/python -m pip install -q -e 'flower[dev,simulation]'
	@touch $@

# Flower and its dependencies go with no other environment; what needs a daemon runs it from .venv.
fleet-test: $(INSTALLED) $(FLOWER)
	@cd flower && .venv/bin/python -m pytest $(PYTEST_ARGS)

bench: $(INSTALLED)
	@$(BIN)/python -m tools.bench $(or $(BENCH),--help)

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) *.egg-info build .mypy_cache .pytest_cache .ruff_cache
	find agentd tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
