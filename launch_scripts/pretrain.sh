#!/usr/bin/env bash
""":"
# Training under the DeepSpeed launcher. This file is shell and Python at once, because the launcher runs it with Python:
#
#   deepspeed --num_gpus 8 launch_scripts/pretrain.sh [RECIPE] [key=value ...]     Python reads it, one process a device
#   bash launch_scripts/pretrain.sh [RECIPE] [key=value ...]                       the shell reads it, and starts the launcher
#
# RECIPE is a path or the name of a shipped recipe, paper_256 if absent. Under bash, these variables may be set:
#   NUM_GPUS   processes on each machine; every device there is, if unset
#   HOSTFILE   machines, a line each: `name slots=8`; this machine alone, if unset
#
# To Python, this shell part is one string; so it holds no backslash and no three quotes in a row. The Python part below has
# no parentheses, so that `bash -n` can read it too.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
if [[ -x "$here/.venv/bin/deepspeed" ]]; then
    PATH="$here/.venv/bin:$PATH"
fi
if ! command -v deepspeed >/dev/null; then
    echo "The deepspeed launcher is not there: run make setup, or activate the environment that has it." >&2
    exit 2
fi

# The launcher's front end would die of a signal and leave its processes behind. So it ignores signals, and this shell hands
# them to all that it started.
set -m
(trap "" INT TERM; exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} "$0" "$@") &
launcher=$!
trap 'kill -TERM -- "-$launcher"' INT TERM
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends a wait early
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
":"""
import icl_moe.training.__main__
