# One command makes everything: `make quickstart` or `make test`. `make help` lists the rest.
BIN := .venv/bin
STAMP := .venv/.made-from-lock

.PHONY: help install quickstart test unit numerics journeys long lint format types contracts docs gpu gpu-wheels clean

help:
	@echo "make quickstart   record, train, evaluate, serve: one policy in about ten minutes"
	@echo "make test         unit tests, then the journeys through the command line"
	@echo "make unit | numerics | journeys | long | lint | format | types | contracts | docs | install | clean"
	@echo "make gpu          what one bare GPU says of this checkout, in eight minutes; make gpu-wheels fetches what it lacks"

# Made again when the lock or the dependencies change; otherwise a second run starts at once.
$(STAMP): uv.lock pyproject.toml
	@.ci/install
	@touch $@

install: $(STAMP)

quickstart: $(STAMP)
	@$(BIN)/pi0fm quickstart

test: $(STAMP)
	@$(BIN)/pytest

# What mirrors pi0fm/; closed forms, parity with LeRobot, measurements, documents and deploy/ have a line of their own.
unit: $(STAMP)
	@$(BIN)/pytest -m "not journey and not long and not gpu" --ignore=tests/numerics --ignore=tests/parity --ignore=tests/bench --ignore=tests/docs --ignore=tests/deploy

numerics: $(STAMP)
	@$(BIN)/pytest -m "not journey and not long and not gpu" tests/numerics tests/parity tests/bench tests/docs tests/deploy

journeys: $(STAMP)
	@$(BIN)/pytest -m "journey and not long"

long: $(STAMP)
	@$(BIN)/pytest -m long

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)
	@$(BIN)/mypy

contracts: $(STAMP)
	@$(BIN)/lint-imports --no-cache

# The site, into build/site; stops at the first warning. It needs nothing of .venv.
docs:
	@.ci/docs

gpu:
	@.ci/gpu

gpu-wheels: $(STAMP)
	@$(BIN)/python .ci/gpu_wheels.py

clean:
	rm -rf .venv .venv-docs .uv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find pi0fm client tests -name __pycache__ -type d -prune -exec rm -rf {} +
