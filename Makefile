# Every target makes the virtual environment it needs; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-full test-gpu fuzz bench bench-gpu lint clean

demo: $(INSTALLED)
	$(BIN)/fastpeft compare --out demo-report

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-full: $(INSTALLED)
	$(BIN)/python -m pytest --full

fuzz: $(INSTALLED)
	FASTPEFT_FUZZ_SEQUENCES=5000 $(BIN)/python -m pytest tests/test_fuzz.py

# The targets for a GPU run in the environment of PYTHON=... where one is named, and install nothing then.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
test-gpu bench-gpu: $(INSTALLED)
endif

test-gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m pytest -m gpu -n auto --maxprocesses=12

# On the CPU, half an hour or more on an idle machine: writes bench/results and the README's table.
bench: $(INSTALLED)
	$(BIN)/python bench/traffic.py --json bench/results/traffic.json
	$(BIN)/python -m pytest bench/bench_lora.py bench/bench_adapter.py -W default --record bench/results/micro.json
	$(BIN)/python bench/throughput.py --head classifier --method lora adapter --dtype fp32 bf16 --dropout 0 0.05 \
	  --batch 4 --inference --startup --rounds 9 --json bench/results/throughput.json
	$(BIN)/python bench/throughput.py --data random rotten-tomatoes --batch 32 --dropout 0.05 --model-dropout 0.1 \
	  --inference --variants frozen peft fastpeft fastpeft_model --rounds 9 --json bench/results/sentences.json
	$(BIN)/python bench/plot.py --table README.md

# On a GPU: the tests, then all that is counted and measured, into one page. A call takes at most eight minutes, and the
# next goes on: until it says that nothing is left.
bench-gpu:
	$(GPU_PYTHON) bench/gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastpeft needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
