# Every target makes the virtual environment it needs; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-full test-gpu fuzz lint clean

demo: $(INSTALLED)
	$(BIN)/fastpeft compare --out demo-report

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-full: $(INSTALLED)
	$(BIN)/python -m pytest --full

fuzz: $(INSTALLED)
	FASTPEFT_FUZZ_SEQUENCES=5000 $(BIN)/python -m pytest tests/test_fuzz.py

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastpeft needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
