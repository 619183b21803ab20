# Targets create .venv if needed; they require Python 3.11+ and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs sweep soak lint clean

demo: .venv/ready
	$(BIN)/compiled-llm generate "What is the capital of France, and what is it known for?" \
		--max-tokens 64 --report --config configs/demo.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=20

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

sweep: .venv/ready
	$(BIN)/python -m tests.model_sweep

MINUTES ?= 10
soak: .venv/ready
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
		--requirement requirements.txt --editable .
	touch $@

clean:
	rm -rf .venv site
