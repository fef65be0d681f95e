#!/usr/bin/env bash
# Evaluates a trained model on held-out episodes with 1, 2 and 3 examples: metrics.json, report.html and raw predictions.
#
#   bash launch_scripts/evaluate.sh MODEL SHARDS [OUT]      OUT is runs/evaluation/<name of MODEL> if absent
#
# MODEL is an exported model folder, or a checkpoint folder, which is exported first. The variable SHOTS may be set; 1,2,3 if unset.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: bash launch_scripts/evaluate.sh MODEL SHARDS [OUT]" >&2
    exit 2
fi
model="${1%/}"
shards="$2"
out="${3:-runs/evaluation/$(basename "$model")}"

root="$(cd "$(dirname "$0")/.." && pwd)"
if [[ -x "$root/.venv/bin/icl-moe" ]]; then
    PATH="$root/.venv/bin:$PATH"
fi

if [[ -d "$model" && ! -f "$model/model.safetensors" ]]; then
    icl-moe export "$model" --out "$out/model"
    model="$out/model"
fi
exec icl-moe evaluate "$model" "$shards" --shots "${SHOTS:-1,2,3}" --out "$out"
