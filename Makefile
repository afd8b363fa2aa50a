# Two commands do everything on a machine with Python >= 3.11, git and make:
#   make demo [ARGS=--quick]    sets up .venv, then simulates, trains, distils and writes the report
#   make test                   sets up .venv, then runs the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup setup-dev lint clean

demo: .venv/core
	$(BIN)/distillbev demo $(ARGS)

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

setup: .venv/core
setup-dev: .venv/dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "distillbev needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Mend: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }

.venv/core: .venv/bin/python requirements.lock pyproject.toml
	@echo "Installing the packages of requirements.lock (torch is large) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock || { \
	  echo "Installing failed (pip's reason stands above). Without network: pip needs a package index or a folder of wheels (PIP_FIND_LINKS)."; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev: .venv/core requirements-dev.lock
	@echo "Installing the test tools of requirements-dev.lock ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.lock || { \
	  echo "Installing failed (pip's reason stands above)."; exit 1; }
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
