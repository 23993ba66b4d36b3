# Everything a newcomer runs. The virtual environment .venv is made by itself, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
SCALE ?= full
DRAFTERS ?= usual
SOURCE ?= cache
TARGET ?= qwen3
TASKS ?= ../shared/eval
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .mkdocs.yml

.PHONY: gpu-check help quickstart serve-check real finetune ablate results test test-slow test-mpi screenshots trust lint docs house format clean clean-all

help:
	@echo "make quickstart  the whole pipeline on a tiny target, 6 to 30 minutes on 2 cores"
	@echo "                 make quickstart TARGET=qwen3_moe (experts) or TARGET=qwen3_next (linear attention)"
	@echo "make real        three drafts for SmolLM2-135M-Instruct, two hours; make real SCALE=smoke  minutes"
	@echo "make finetune    the drafts of make real fine-tuned on a narrow domain, half an hour; SCALE=smoke  minutes"
	@echo "make ablate      what each choice costs or brings, and every drafter and loss side by side, on the quickstart's target, two hours"
	@echo "make results     docs/results.md from what real, finetune and ablate have measured"
	@echo "make serve-check the quickstart's drafts in real engines (vLLM, llama.cpp, SGLang's draft classes on CPU), compared with ours"
	@echo "make test        the quick tests"
	@echo "make lint        ruff, mypy, import contracts, and the site built strictly"
	@echo "make docs        the site of docs/, with the reference made from the code, in build/site"
	@echo "make test-slow   the tests of minutes each;  make test-mpi  those under mpirun"
	@echo "make screenshots the pages in a headless Chromium (of the system: chromium), pictures in build/screenshots;"
	@echo "                 after the quickstart also those of the documentation, in docs/images"
	@echo "make trust       kills, rot, hostile servers, full disks, fuzzing: an hour; writes docs/trust.md"
	@echo "make gpu-check   all that only a GPU can tell, in nine minutes, without a network; writes docs/gpu.md; DRY=1 tries it on the CPU"
	@echo "make house       size, length and names of the code against their limits"
	@echo "make format      format the code"
	@echo "make clean       remove build/;  make clean-all  the virtual environment too"

$(READY): setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	@echo "installing into .venv (about a minute; once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: $(READY)
	@$(BIN)/python tools/quickstart.py --drafters $(DRAFTERS) --source $(SOURCE) --target-type $(TARGET)

real: $(READY)
	@$(BIN)/python tools/real.py --scale $(SCALE) --tasks $(TASKS) --drafters $(DRAFTERS)

finetune: $(READY)
	@$(BIN)/python tools/finetune.py --scale $(SCALE)

ablate: quickstart
	@$(BIN)/python tools/ablate.py
	@$(BIN)/python -m deepspec demo drafters

results: $(READY)
	@$(BIN)/python tools/results.py

serve-check: quickstart
	@$(BIN)/python tools/serve_check.py --json build/serve-check/result.json --page docs/serving.md

test: $(READY)
	@$(BIN)/python -m pytest

test-slow: $(READY)
	@$(BIN)/python -m pytest -m "slow and not mpi"

screenshots: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev,browser]'
	@DEEPSPEC_IMAGES=$(if $(wildcard build/quickstart/report.html),docs/images) $(BIN)/python -m pytest -m browser tests/browser
	@echo "build/screenshots$(if $(wildcard build/quickstart/report.html), and docs/images)"

test-mpi: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev,mpi]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m mpi

trust: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev,mpi]'
	@$(BIN)/python benchmarks/trust.py --json build/trust.json --page docs/trust.md

# a lent GPU machine has a python3 with torch of its own, and no network: no installation here
gpu-check:
	@PYTHONPATH=.$(if $(PYTHONPATH),:$(PYTHONPATH)) $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py \
		$(if $(DRY),--dry-run,--json docs/gpu.json --page docs/gpu.md)

lint: $(READY)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@report=$$($(BIN)/lint-imports 2>&1) || { echo "$$report"; exit 1; }
	@$(SITE)
	@echo "lint: ruff, mypy, the import contracts and the site are clean"

docs: $(READY)
	@$(SITE)
	@echo "build/site/index.html"

house: $(READY)
	@$(BIN)/python benchmarks/house.py

format: $(READY)
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

clean:
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

clean-all: clean
	@rm -rf .venv *.egg-info
