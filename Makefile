# Every command of the project. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help demo test check dialect-suite matrix bench bench-peers soak clean

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# the tests start hundreds of processes, and each would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[asyncio,cli,postgres,server]' --group test --group check
	touch $@

demo: .venv/ready ## show timers in a libSQL file: kept through kills, and fired once by two workers
	$(BIN)/python -m examples.order_reminders

test: .venv/ready ## run all tests, on libSQL files and a libSQL server, SQLite, and a PostgreSQL server of their own
	$(BIN)/python -m pytest -n 4 --dist worksteal --ignore tests/docs

check: .venv/ready ## formatting, lint, types, layers, the docs' code, SQLAlchemy's suite, and the package in a fresh environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/typing/user_program.py
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 tests/docs
	$(BIN)/python -m tests.dialect_suite
	$(BIN)/python tests/packaging.py dist
	$(BIN)/python tests/wheel.py dist

matrix: .venv/ready ## the quick part of the tests on each Python, SQLAlchemy and PostgreSQL that is to be had
	$(BIN)/python tests/matrix.py .matrix

dialect-suite: .venv/ready ## SQLAlchemy's own suite for dialects, on ours and on the standard library's
	$(BIN)/python -m tests.dialect_suite

bench: .venv/ready ## compare with the raw drivers, and measure dispatchers; prints ratios
	$(BIN)/python benchmarks/floors.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/server.py

.venv-peers/ready: benchmarks/peers/constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint benchmarks/peers/constraints.txt 'pgqueuer[asyncpg]' apscheduler sqlalchemy 'psycopg[binary]'
	touch $@

bench-peers: .venv/ready .venv-peers/ready ## compare with others that fire jobs from PostgreSQL, in an environment of their own
	$(BIN)/python benchmarks/compare.py .venv-peers/bin/python

soak: .venv/ready ## the longer crash and scale runs
	$(BIN)/python -m pytest -m slow

clean: ## remove what the other targets made
	rm -rf .venv .venv-peers .matrix dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
