PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python3)

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install:  ## Make .venv and install everything that training and testing need
	bash -c '. scripts/environment.sh && ensure_environment requirements.txt requirements-dev.txt'

install-eval:  ## Add LLM Foundry and lm-eval to .venv (eval/eval_openlm_ckpt.py --engine llm-foundry|lm-eval)
	bash -c '. scripts/environment.sh && ensure_environment requirements.txt requirements-eval.txt requirements-eval-no-deps.txt'

check:  ## Format, lint, types, floors
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/contracts

test:  ## The tests, but those marked slow
	bash scripts/test.sh

test-all:  ## All tests
	bash scripts/test.sh -m ""

soak:  ## Kill and resume a small run 500 times in all settings (about 40 minutes on two idle cores; CYCLES=20 SEED=1 for less)
	$(PYTHON) tests/faults/soak.py --cycles $${CYCLES:-500} --seed $${SEED:-0} --json soak.json

mutants:  ## Plant 131 bugs, one at a time, and see which the tests notice (about an hour; ONLY=masking for some)
	$(PYTHON) tests/mutants --only "$$ONLY" --json mutants.json

docs:  ## Build the site of docs/ into site/ (mkdocs)
	bash -c '. scripts/environment.sh && ensure_environment requirements.txt requirements-docs.txt'
	$(PYTHON) -m mkdocs build --strict

dist:  ## Build wheel and sdist into dist/
	$(PYTHON) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

nightly:  ## Exports under transformers 4.57, the current one and llama.cpp, in environments of their own
	bash scripts/nightly_exports.sh

flags:  ## Regenerate docs/flags.md from the flags in the code
	$(PYTHON) scripts/flags_page.py

house:  ## Count modules, floors and arrows
	$(PYTHON) scripts/house.py

walks:  ## Count the files that a checkpoint's name, a manifest, a document and a run's length go through
	$(PYTHON) scripts/walks.py

smoke:  ## Train 20 steps on the CPU on synthetic data
	rm -rf /tmp/open_lm_smoke
	$(PYTHON) -m open_lm.main --dataset-type synthetic --model open_lm_test_tiny --device cpu --precision fp32 \
	  --global-batch-size 4 --train-tokens 1280 --warmup 5 --log-every-n-steps 5 --logs /tmp/open_lm_smoke --name smoke

CUDA_VENV ?= .venv-cuda

trace-cuda:  ## Steps on fake CUDA tensors: installs a CUDA build of torch (5 GB) into CUDA_VENV, .venv-cuda; needs no GPU
	test -x $(CUDA_VENV)/bin/python || { $(PYTHON) -m venv $(CUDA_VENV) && $(CUDA_VENV)/bin/pip install -q torch==2.11.0; }
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" > \
	  $$(echo $(CUDA_VENV)/lib/python3*/site-packages)/zz_project.pth
	$(CUDA_VENV)/bin/python scripts/trace_cuda.py

.PHONY: help install install-eval check test test-all soak mutants docs dist nightly flags house walks smoke trace-cuda
