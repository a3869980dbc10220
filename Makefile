# make demo     everything on a fresh machine: environment, then raw images to stylized outputs
# make test     environment, lint, types, all tests but the slow ones
# make setup    the part they share; does nothing when nothing changed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A folder or page of wheels that pip is told of is told to uv too, which does not read pip's settings.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# Nothing here reports home.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: setup demo test test-slow lint format types bench clean constraints

setup: $(VENV)/.installed

# Compiled now: where Python may not write its caches (PYTHONDONTWRITEBYTECODE, a venv of root's), each of Ray's
# processes would compile Ray, pandas and torch for itself.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"expected Python 3.11 or newer, found {sys.version.split()[0]}; run make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --compile-bytecode --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[server,dev]'
	@touch $@

demo: setup
	$(BIN)/python pipelines/demo.py $(DEMO_ARGS)

test: lint types
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python bench/run.py $(BENCH_ARGS)

# Newest releases that the ranges of pyproject.toml admit. torch's own build tag (+cpu) is left out, so that the
# same file serves every build of it.
constraints: setup
	$(BIN)/uv pip compile pyproject.toml --all-extras --upgrade --no-header --no-annotate --quiet --output-file constraints.txt
	sed -i -E 's/^(torch==[^+]*)\+.*$$/\1/' constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
