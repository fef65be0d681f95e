#!/usr/bin/env bash
""":"
# Training under the DeepSpeed launcher. This file is both a shell script and a Python program, because the launcher runs it with Python:
#
#   deepspeed --num_gpus 8 launch_scripts/pretrain.sh [RECIPE] [key=value ...]     Python reads it, one process per device
#   bash launch_scripts/pretrain.sh [RECIPE] [key=value ...]                       the shell reads it and starts the launcher
#
# RECIPE is a path or the name of a shipped recipe, paper_256 if absent. Under bash, these variables may be set:
#   NUM_GPUS   processes on each machine; one per device if unset
#   HOSTFILE   a file with one machine per line: `name slots=8`; only this machine if unset
#
# For Python, this shell part is one string, so it contains no backslash and no three quotes in a row. The Python part below has
# no parentheses, so that `bash -n` can parse it.
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
if [[ -x "$here/.venv/bin/deepspeed" ]]; then
    PATH="$here/.venv/bin:$PATH"
fi
if ! command -v deepspeed >/dev/null; then
    echo "The deepspeed launcher was not found: run make setup, or activate its environment." >&2
    exit 2
fi

# If the launcher did not find the HOSTFILE, it would train on this machine alone.
machines=1
if [[ -n "${HOSTFILE:-}" ]]; then
    if [[ ! -f "$HOSTFILE" || ! -r "$HOSTFILE" ]]; then
        echo "icl-moe: HOSTFILE: there is no readable file $HOSTFILE; name one with a line for each machine, such as: worker-1 slots=8" >&2
        exit 2
    fi
    machines=0
    names=" "
    entry="^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=[1-9]"
    while read -r line || [[ -n "$line" ]]; do
        if [[ "$line" =~ ^[[:space:]]*(#|$) ]]; then
            continue
        fi
        if [[ ! "$line" =~ $entry || "$names" == *" ${BASH_REMATCH[1]} "* ]]; then
            echo "icl-moe: HOSTFILE: in $HOSTFILE the line '$line' is invalid; each machine needs one line, such as: worker-1 slots=8" >&2
            exit 2
        fi
        names+="${BASH_REMATCH[1]} "
        machines=$((machines + 1))
    done <"$HOSTFILE"
    if [[ $machines -eq 0 ]]; then
        echo "icl-moe: HOSTFILE: $HOSTFILE names no machine; write one line per machine, such as: worker-1 slots=8" >&2
        exit 2
    fi
fi

# On one machine the launcher starts with signals blocked: only the ranks handle them, and the launcher ends after the ranks,
# with exit code 0 if they have saved. With several machines its front end must receive signals to pass them on, but it
# ignores them until it has started: otherwise they would kill it and leave its processes behind.
set -m
arguments=(${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} "$0" "$@")
if [[ $machines -eq 1 ]]; then
    python -m icl_moe.signals deepspeed "${arguments[@]}" &
else
    (trap "" INT TERM; exec deepspeed "${arguments[@]}") &
fi
launcher=$!
asked=""
stop() {
    if [[ -n "$asked" ]] && ((SECONDS - asked > 2)); then  # a second request ends the run at once
        kill -KILL -- "-$launcher"
    else
        asked="${asked:-$SECONDS}"
        kill -TERM -- "-$launcher"
    fi
}
trap stop INT TERM
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends a wait early
    status=0
    wait "$launcher" || status=$?
done
if [[ -n "$asked" && $status -eq 143 ]]; then  # stopped before the ranks were connected: nothing was lost
    status=0
fi
exit "$status"
":"""
import icl_moe.hear_signals
import icl_moe.training.__main__
