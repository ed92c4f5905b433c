# Everything a developer does here, by name. `make` alone lists it.

PYTHON ?= python3
ARGS ?=
SEEDS ?= 1000
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
VENV := .venv
BIN := $(VENV)/bin
CHECKED := engine providers server tests benchmarks
# Its rules are of structured concurrency, and it reads 250 lines a second: not the tests, but what they stand on.
ASYNC_CHECKED := engine providers server benchmarks tests/harness
# A module's tests stay in one process, with the servers that they share.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
EXTRAS := embeddings mcp otel postgres redis simulate test check

# uv lives in a venv of its own, for `make lock` alone.
LOCK_VENV := build/lock
COMPILE = $(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --custom-compile-command "make lock" $(ARGS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env serve test check simulate mutate bench bench-full bench-ttfb format lock clean

help: ## this list
	@echo "Lumos. Say make and one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "JOBS=1 runs the tests one after the other. PYTHON=python3.12 names another interpreter for a new .venv; ARGS='...' goes on to lumos serve, pytest or uv."

serve: $(VENV)/.run ## run the server on http://127.0.0.1:8080 (ARGS="--port 9000")
	@exec $(BIN)/lumos serve $(ARGS)

env: $(VENV)/.dev ## make .venv with everything for development
	@echo "Ready: $(VENV), $$($(BIN)/python --version)"

test: $(VENV)/.dev ## all tests (ARGS="-k resume -x")
	@$(PYTEST) $(ARGS)

check: $(VENV)/.dev ## format, lint, strict types, and branch coverage (of all but tests of processes)
	@echo "== format (ruff)"
	@$(BIN)/ruff format --check .
	@echo "== lint (ruff)"
	@$(BIN)/ruff check .
	@echo "== lint (flake8-async)"
	@$(BIN)/flake8 $(ASYNC_CHECKED) && echo "All checks passed!"
	@echo "== types (mypy --strict)"
	@$(BIN)/mypy --strict $(CHECKED)
	@echo "== tests"
	@$(PYTEST) -m "not unmeasured" $(ARGS) --cov
	@echo "== statement and branch coverage: engine (98 % at least), the rest (92 %)"
	@$(BIN)/coverage report --format=total --precision=1 --include='engine/*' --fail-under=98
	@$(BIN)/coverage report --format=total --precision=1 --omit='engine/*' --fail-under=92

simulate: $(VENV)/.dev ## act simulated systems (SEEDS=1000 or SEEDS=5000-5999; docs/simulation.md)
	@$(BIN)/lumos simulate --seeds $(SEEDS) $(ARGS)

mutate: $(VENV)/.dev ## break the code in many ways and see which test notices (ARGS="cursor"; docs/mutation.md)
	@$(BIN)/python -m tests.mutation.run $(ARGS)

bench: $(VENV)/.run ## against peers and floor, 5 to 10 minutes (ARGS="--arms lumos,floor --workloads w1,w5 --rounds 3")
	@$(BIN)/python -m benchmarks.bench.run $(ARGS)

bench-full: $(VENV)/.run ## all workloads, 7 long rounds: ten hours; Ctrl-C keeps what is measured
	@$(BIN)/python -m benchmarks.bench.run --full $(ARGS)

bench-ttfb: $(VENV)/.run ## TTFB of streaming against waiting, over real sockets (ARGS="--agent demo-93s --rounds 1 --at-once")
	@$(BIN)/python -m benchmarks.ttfb $(ARGS)

format: $(VENV)/.dev ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

lock: $(LOCK_VENV)/.done ## renew requirements/*.txt from pyproject.toml (ARGS=--upgrade for newer versions)
	@echo "Resolving"
	@$(COMPILE) --group lock -o requirements/lock.txt
	@$(COMPILE) pyproject.toml --group build -o requirements/run.txt
	@$(COMPILE) pyproject.toml --group build $(addprefix --extra ,$(EXTRAS)) -c requirements/run.txt -o requirements/dev.txt
	@$(LOCK_VENV)/bin/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["legacy-stubs"], sep="\n")' \
		| $(COMPILE) - -c requirements/run.txt -o requirements/legacy-stubs.txt
	@grep -c == requirements/*.txt

clean: ## remove .venv, caches and build results
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* coverage.json
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu ship Python without venv: one clear line beats a traceback.
define NEED_PYTHON
	@command -v $(PYTHON) >/dev/null || { \
		echo "Lumos needs Python 3.11 or newer, and there is no $(PYTHON): apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Lumos needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: apt-get install" \
			"python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" >&2; exit 1; }
endef

# The environment. A stamp file says what is installed; a lock file newer than its stamp is installed again.

# -qq: errors only.
INSTALL := $(BIN)/python -m pip install -qq --no-deps
EDITABLE := $(INSTALL) --no-build-isolation --editable .

$(VENV)/.run: requirements/run.txt pyproject.toml $(VENV)/.made
	@echo "Installing what the server needs (requirements/run.txt)"
	@$(INSTALL) --require-hashes -r requirements/run.txt
	@$(EDITABLE)
	@touch $@

# dev.txt holds all of run.txt, in the same versions: one installation settles both stamps.
$(VENV)/.dev: requirements/dev.txt pyproject.toml $(VENV)/.made
	@echo "Installing what development needs (requirements/dev.txt)"
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@$(EDITABLE)
	@touch $(VENV)/.run $@

$(VENV)/.made:
	$(NEED_PYTHON)
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(LOCK_VENV)/.done: requirements/lock.txt
	$(NEED_PYTHON)
	@echo "Installing uv (requirements/lock.txt)"
	@$(PYTHON) -m venv --clear $(LOCK_VENV)
	@$(LOCK_VENV)/bin/python -m pip install -qq --no-deps --require-hashes -r requirements/lock.txt
	@touch $@
