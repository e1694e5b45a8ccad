#!/usr/bin/env bash
# A second environment with another transformers beside the packages of .venv: `bash scripts/transformers_environment.sh 4.57.6 FOLDER`.
# The nightly tests give its interpreter as OPENLM_TRANSFORMERS_PYTHON; .venv itself is not changed.
set -euo pipefail
version=${1:?the version of transformers, such as 4.57.6}
folder=${2:?the folder to make}
base=${PYTHON:-"$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python"}
[ -x "$base" ] || base=python3
packages=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

"$base" -m venv --without-pip "$folder"
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$own/base_environment.pth" # searched behind the folder's own packages: torch and numpy come from there
shopt -s nullglob
needs=(regex requests filelock packaging "huggingface_hub<1.0" "tokenizers>=0.22,<=0.23.0" hf-xet "datasets==4.4.1")
case $version in 4.*) ;; *) needs=() ;; esac
"$base" -m pip install --quiet --no-deps --target "$own" "transformers==$version" "${needs[@]}"
"$folder/bin/python" -c 'import transformers; print("transformers", transformers.__version__, "in", transformers.__file__)'
