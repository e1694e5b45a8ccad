#!/usr/bin/env bash
# The tests but the slow ones: makes the environment if needed, then runs pytest on all cores. Further words go to pytest:
# `bash scripts/test.sh -k data`; `bash scripts/test.sh -m ""` runs all, `-m slow` those that `make test-all` adds.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ensure_environment requirements.txt requirements-dev.txt
(ensure_environment requirements-eval.txt requirements-eval-no-deps.txt) ||
    echo "LLM Foundry and lm-eval cannot be installed here: their tests are skipped."
exec "$PYTHON" -m pytest -rs -n auto --dist loadfile -m "not slow" "$@"
