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

test:  ## The whole test suite
	bash scripts/test.sh

flags:  ## Write docs/flags.md anew from the flags in the code
	$(PYTHON) scripts/flags_page.py

house:  ## Count modules, floors and arrows
	$(PYTHON) scripts/house.py

smoke:  ## Train 20 steps on the CPU on synthetic data
	rm -rf /tmp/open_lm_smoke
	$(PYTHON) -m open_lm.main --dataset-type synthetic --model open_lm_test_tiny --device cpu --precision fp32 \
	  --global-batch-size 4 --train-tokens 1280 --warmup 5 --log-every-n-steps 5 --logs /tmp/open_lm_smoke --name smoke

.PHONY: help install install-eval check test flags house smoke
