# Everything from a fresh clone with nothing but Python 3.11 or newer. `make run` draws, `make test` tests.
# The environment is .venv; stamps in it say which dependency groups are installed for which pyproject.toml.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := .venv/bin
INSTALL := env -u PYTHONPATH -u PYTHONHOME $(BIN)/python tools/install.py
# commands that tests start find bytecode, as they do at users'
RUN := env -u PYTHONPATH -u PYTHONHOME -u PYTHONDONTWRITEBYTECODE
PROMPT ?= A blue sign that says "HELLO"

.PHONY: run test check fmt docs clean kernels

run: .venv/.base kernels
	@$(RUN) $(BIN)/lanting generate '$(PROMPT)' --seed 7 -o lanting.png --force
	@echo "  the picture is $(CURDIR)/lanting.png"

test: .venv/.test kernels
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/.dev
	$(RUN) $(BIN)/ruff check .
	$(RUN) $(BIN)/ruff format --check .
	$(RUN) $(BIN)/pyright

fmt: .venv/.dev
	$(RUN) $(BIN)/ruff check --fix .
	$(RUN) $(BIN)/ruff format .

docs: .venv/.test
	$(RUN) $(BIN)/python docs/make_cli.py

# Installing builds them; this does so again when their sources have changed, and is done in a moment when not.
kernels: | .venv/bin/python
	@$(RUN) $(BIN)/python src/lanting/kernels/build.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache src/lanting/kernels/libkernels.*

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "lanting needs Python 3.11 or newer, and none was found: install it, or run 'make PYTHON=/path/to/python'"; exit 2; }
	@env -u PYTHONPATH -u PYTHONHOME "$(PYTHON)" -m venv .venv || { rm -rf .venv; echo "the environment could not be made: $(PYTHON) lacks the venv module (on Debian: apt install python3-venv)"; exit 2; }

.venv/.base: pyproject.toml | .venv/bin/python
	@echo "installing lanting into .venv (once; torch is large)"
	@$(INSTALL)
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	@echo "installing lanting and what its tests need into .venv (once)"
	@$(INSTALL) test
	@touch $@ .venv/.base

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "installing lanting and its developer tools into .venv (once)"
	@$(INSTALL) dev
	@touch $@ .venv/.test .venv/.base
