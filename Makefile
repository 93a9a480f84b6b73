# Each target sets up what it needs: a virtual environment in .venv, from the lock files.
SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
WORKERS := 2

.PHONY: help quickstart test faults lint format doctor install clean

help:
	@echo "make quickstart   the whole journey on CPU, raw text to report [ARGS='key=value ...']"
	@echo "make test         all tests, on two workers [ARGS='tests/test_run.py -k atomic']"
	@echo "make faults       break a running alignment in every way, and write docs/reliability.md"
	@echo "make lint         ruff and mypy          make format   ruff format"
	@echo "make doctor       check this machine     make clean    remove .venv and caches"

quickstart: $(READY)
	@$(RUN) -m jobs.quickstart jobs/recipes/quickstart.yaml $(ARGS)

test: $(READY)
	@$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(READY)
	@$(RUN) -m tests.faults.report $(ARGS)

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy platform actors jobs

format: $(READY)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

doctor: $(READY)
	@$(RUN) -m jobs.doctor $(ARGS)

install: $(READY)

# The stamp is written last; a lock that is newer renews the installation.
$(READY): requirements/install requirements/cpu.lock requirements/dev.lock
	@requirements/install $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
