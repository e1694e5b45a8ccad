# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv in the clone and installs what is asked for, once.
#
#   ensure_environment requirements.txt [requirements-dev.txt ...]
#
# afterwards "$PYTHON" is the interpreter to use. What has been installed is not looked at again until a requirements
# file changes. OPENLM_PYTHON=/path/to/python uses an environment of your own instead, and installs nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_VERSION=2.13.0                                   # the version the tests run with
CPU_WHEELS=https://download.pytorch.org/whl/cpu

fail() { echo "error: $*" >&2; exit 1; }

has_gpu() { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; }

is_python_we_need() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_python_we_need "$name"; then command -v "$name"; return; fi
    done
    fail "no Python 3.10 or newer on PATH. Install one, or name it: OPENLM_PYTHON=/path/to/python (with requirements.txt installed)."
}

# The build that plain `pip install torch` would take: its version, such as 2.13.0 (with CUDA, GBs) or 2.13.0+cpu.
torch_on_offer() {
    "$PYTHON" -m pip install --quiet --dry-run --no-deps --ignore-installed --report - "torch==$TORCH_VERSION" 2> /dev/null |
        "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2> /dev/null
}

# Without a GPU the CPU build is enough; elsewhere requirements.txt takes the default build, which on Linux holds CUDA.
install_cpu_torch() {
    if has_gpu || [ "$(uname -s)" != Linux ] || "$PYTHON" -c 'import torch' 2> /dev/null; then return; fi
    case $(torch_on_offer) in
        *+cpu) "$PYTHON" -m pip install "torch==$TORCH_VERSION" ;;
        *) "$PYTHON" -m pip install "torch==$TORCH_VERSION" --index-url "$CPU_WHEELS" ||
            echo "$CPU_WHEELS cannot be reached: taking the default build of torch, which is larger." ;;
    esac
}

# The stamp is written last, so an install that was interrupted is done again.
install_once() {
    local file=$1 stamp=$ROOT/.venv/installed-$1 hash
    local hashed='import hashlib, os, sys; print(hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[1:] if os.path.exists(path))).hexdigest())'
    hash=$("$PYTHON" -c "$hashed" "$ROOT/constraints.txt" "$ROOT/$file")
    if [ "$(cat "$stamp" 2> /dev/null)" = "$hash" ]; then return; fi
    echo "installing $file into .venv (once; it takes a minute or two)"
    install_cpu_torch || fail "torch $TORCH_VERSION could not be installed; pip's message is above."
    local options=()
    case $file in *no-deps*) options=(--no-deps) ;; esac
    "$PYTHON" -m pip install "${options[@]}" -r "$ROOT/$file" || fail "pip install -r $file went wrong; its message is above."
    echo "$hash" > "$stamp"
}

ensure_environment() {
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if [ -n "${OPENLM_PYTHON:-}" ]; then
        is_python_we_need "$OPENLM_PYTHON" || fail "OPENLM_PYTHON=$OPENLM_PYTHON is not Python 3.10 or newer."
        PYTHON=$OPENLM_PYTHON
        return
    fi
    PYTHON=$ROOT/.venv/bin/python
    if ! is_python_we_need "$PYTHON"; then
        local base
        base=$(find_python) || exit 1
        echo "making .venv with $("$base" --version)"
        "$base" -m venv --clear "$ROOT/.venv" || fail "$base cannot make environments. On Debian and Ubuntu: apt-get install python3-venv."
    fi
    local file
    for file in "$@"; do install_once "$file"; done
}
