#!/usr/bin/env bash
# Exports under the programs that people load them with, each in an environment of its own:
# `bash scripts/nightly_exports.sh [FOLDER [PART...]]`, the parts being exports_current, exports_older, published_current,
# published_older and gguf; without any, all of them.
# Every family, tied and untied, under transformers 4.57 and the current one: logits, generate, Trainer, checkpointing, LoRA,
# save and reload; the published folders under both; GGUF files under llama.cpp. Takes half an hour on two cores, downloads 100 MB.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.nightly}
parts=" ${*:2} "
python=${PYTHON:-"$PWD/.venv/bin/python"}
[ -x "$python" ] || python=python3
older=4.57.6
llama_cpp=0.3.36
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

made() { [ -e "$1" ] || { shift && "$@"; }; }
made "$folder/older/bin/python" env PYTHON="$python" bash scripts/transformers_environment.sh $older "$folder/older" || exit 1
made "$folder/llama_cpp/llama_cpp" "$python" -m pip install --quiet --no-deps --target "$folder/llama_cpp" \
  llama-cpp-python==$llama_cpp diskcache || exit 1

declare -A outcome
tests() {  # NAME, then what to run
  local name=$1 log="$folder/$1.txt"
  shift
  [[ $parts == "  " || $parts == *" $name "* ]] || return 0
  if "$@" >"$log" 2>&1; then outcome[$name]="passed: $(grep -E "[0-9]+ (passed|skipped)" "$log" | tail -n 1)"; else outcome[$name]="FAILED: $log"; failed=1; fi
  echo "$name: ${outcome[$name]}"
}
failed=0
export OPENLM_NIGHTLY=1 TOKENIZERS_PARALLELISM=false
for version in current older; do
  other=$python
  [ $version = current ] || other="$folder/older/bin/python"
  tests "exports_$version" env OPENLM_TRANSFORMERS_PYTHON="$other" \
    "$python" -m pytest -rs -m "" tests/hf/test_exports_in_use.py
done
tests published_current "$python" -m pytest -rs -m "" tests/hf/test_published_folders.py tests/hf/test_export.py tests/hf/test_hub.py
tests published_older env OPENLM_TRANSFORMERS_PYTHON="$folder/older/bin/python" \
  "$python" -m pytest -rs -m "" tests/hf/test_other_transformers.py
tests gguf env PYTHONPATH="$folder/llama_cpp" "$python" -m pytest -rs -m "" tests/weights
exit $failed
