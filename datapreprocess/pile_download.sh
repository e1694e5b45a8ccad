#!/usr/bin/env bash
# The Pile (arXiv:2101.00027) without its copyrighted parts, from the Hugging Face Hub, as .jsonl.zst:
#     bash datapreprocess/pile_download.sh OUTPUT_DIR [--max-files N] [further flags of hf_dataset.py]
# Begun again it goes on with the files that are missing. The original host no longer serves the Pile.
set -euo pipefail
if [ $# -lt 1 ] || [ "${1:0:1}" = "-" ]; then
    echo "usage: bash pile_download.sh OUTPUT_DIR [--max-files N]" >&2
    exit 64
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../.venv/bin/python}"
[ -x "$python" ] || python=python3
output="$1"
shift
exec "$python" "$here/hf_dataset.py" --dataset monology/pile-uncopyrighted --output-dir "$output" --files 'train/*' "$@"
