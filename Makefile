# Everything happens in .venv, which `make setup` makes with plain pip; the other targets call it themselves.

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST      := .venv/bin/python -m pytest -n 2
# A test that hangs prints every thread's stack and ends its process; it is tried once more in a new process.
HANGING     := --timeout-method thread --reruns 1 --only-rerun Timeout
INSTALL     := .venv/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))
READY       := .venv/.ready

# One thread per process: the engines and the tests use the cores by processes.
export OMP_NUM_THREADS = 1

.PHONY: help setup run test slow lint types clean

help:
	@echo "make run     set up, then the demo: twenty devices, half of them too small for the model"
	@echo "make test    set up, then the tests, under ten minutes"
	@echo "make slow    the tests that take minutes each"
	@echo "make lint    ruff: rules and format        make types   mypy"
	@echo "make setup   .venv alone; CONSTRAINTS= takes the newest releases instead of those tested"

setup: $(READY)

# torch goes first and alone, so that what it is built for (CPU, CUDA) is decided by pip's own configuration.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt is for Python 3.11 or newer;\
	 name one with PYTHON=python3.11, or take the newest releases with CONSTRAINTS=" if "$(CONSTRAINTS)" else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e '.[run,hf,dev]'
	@touch $@

run: setup
	.venv/bin/lilliput demo

test: setup
	$(PYTEST) --timeout 600 $(HANGING)

slow: setup
	$(PYTEST) --timeout 900 $(HANGING) -m slow

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/mypy

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
