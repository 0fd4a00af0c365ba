# Everything a fresh machine needs is Python 3.11+, git and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CORES := $(shell nproc 2>/dev/null || echo 2)
# The slow tests wait for processes more than they compute: one more of them at a time.
WORKERS ?= $(if $(filter true,$(CI)),$(shell echo $$(($(CORES) + 1))),$(CORES))

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

.PHONY: demo test check bench bench-peers format clean

demo: $(STAMP)  ## a CA, a coordinator and four hospitals over TLS learn from generated images; leaves a report
	rm -rf runs/demo
	scripts/demo --run-dir runs/demo

test: $(STAMP)  ## the tests; those marked slow run with CI=true
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(filter true,$(CI)),,-m "not slow") $(ARGS)

check: $(STAMP)  ## formatting, linting, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## measure; BENCH=name runs one of bench/*.py
	$(BIN)/python bench/run.py $(BENCH)

bench-peers:  ## what benchmarks compare with and need not have; NVFlare pins packages that we use
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q --disable-pip-version-check "nvflare==2.9.*"

# torch comes first and by itself: left to the resolver, an open range would choose another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-peers runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
