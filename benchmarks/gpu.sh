#!/usr/bin/env bash
# Measures speed on one GPU within 10 minutes: benchmarks/gpu.sh [--wheels FOLDER] [options of gpu.py run]
#
# The machine needs Python with PyTorch, transformers, numpy, pillow and PyYAML. Wheels of what it
# lacks can lie in FOLDER: they are installed into a temporary folder, without any index. It writes
# gpu.json (--json FILE) part by part, and prints the table of docs/performance.md. --quick tries
# everything at toy size, on a CPU too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
if [ "${1:-}" = --wheels ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$2"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    shift 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" benchmarks/gpu.py run "$@"
