# Every target makes the virtual environment it needs; nothing has to be installed first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# A test process a core, each with one thread; `make test WORKERS=0` for none beside pytest's own.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist=loadgroup

.PHONY: demo test test-full test-peers test-versions test-oldest test-newest test-gpu fuzz bench bench-gpu lint clean

# In 25 steps a language model learns most at ten times the rate of a whole epoch, by each of these but prefix.
demo: $(INSTALLED)
	$(BIN)/fastpeft compare --max-steps 50 --out demo-report/classify
	$(BIN)/fastpeft compare --task lm --max-steps 25 --seeds 2 --lr 0.01 --out demo-report/lm

test: $(INSTALLED)
	$(PYTEST)

test-full: $(INSTALLED)
	$(PYTEST) --full

# The suite at both ends of the versions that pyproject.toml admits; with make -k at the newest whatever the oldest does.
test-versions: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/installed
	@.venv-$*/bin/python -m pip list | grep -E '^(torch|triton|transformers|peft|accelerate|numpy) '
	.venv-$*/bin/python -m pytest

# Peers' own tests on patched models, from checkouts of theirs: make test-peers PEFT=... TRANSFORMERS=..., or one of them.
test-peers: $(INSTALLED)
	@[ -n "$(PEFT)$(TRANSFORMERS)" ] || { echo "name a checkout: make test-peers PEFT=../peft TRANSFORMERS=../transformers"; exit 2; }
	$(BIN)/python -m pip install --quiet -c constraints.txt parameterized scipy datasets diffusers
	[ -z "$(PEFT)" ] || $(BIN)/python tests/peers.py $(PEFT) tests/test_custom_models.py -k "lora or LoRA or Conv1D"
	[ -z "$(TRANSFORMERS)" ] || $(BIN)/python tests/peers.py $(TRANSFORMERS) tests/models/gpt2/test_modeling_gpt2.py

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
	$(BIN)/python bench/host.py --vary --json bench/results/host.json
	$(BIN)/python -m pytest bench/bench_lora.py bench/bench_adapter.py -W default --record bench/results/micro.json
	$(BIN)/python -m pytest bench/bench_lm_head.py -W default --record bench/results/head.json
	$(BIN)/python bench/throughput.py --head classifier --method lora adapter --dtype fp32 bf16 --dropout 0 0.05 \
	  --batch 4 --inference --startup --rounds 9 --json bench/results/throughput.json
	$(BIN)/python bench/throughput.py --data random rotten-tomatoes --batch 32 --dropout 0.05 --model-dropout 0.1 \
	  --inference --variants frozen peft fastpeft fastpeft_model --rounds 9 --json bench/results/sentences.json
	$(BIN)/python bench/throughput.py --head lm --data rotten-tomatoes rotten-tomatoes-answers --batch 16 --dropout 0.05 \
	  --inference --variants peft fastpeft fastpeft_model --rounds 7 --json bench/results/language.json
	$(BIN)/python bench/throughput.py --head lm --batch 4 --dropout 0.05 --inference \
	  --variants peft fastpeft fastpeft_model --rounds 7 --json bench/results/language.json --resume
	$(BIN)/python bench/throughput.py --generate --batch 1 8 --seq 16 --dropout 0 \
	  --variants frozen peft fastpeft fastpeft_model --rounds 9 --json bench/results/generate.json
	$(BIN)/python bench/together.py --rounds 9 --json bench/results/together.json
	$(BIN)/python bench/together.py --model half --head classifier --rows 16 --adapters 8 --rounds 9 \
	  --json bench/results/together.json --resume
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
	rm -rf .venv .venv-oldest .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastpeft needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-oldest/installed: ONLY := -c constraints-oldest.txt
.venv-oldest/installed .venv-newest/installed: pyproject.toml constraints-oldest.txt
	@[ $$(df -Pm . | awk 'NR == 2 { print $$4 }') -ge 8000 ] || \
	  { echo "$(@D) takes 8 GB (on Linux pip's torch is a CUDA build), and fewer are free: not tested"; exit 2; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --upgrade $(ONLY) -e ".[dev]"
	touch $@
