#!/usr/bin/env bash
# A run on this machine: N ranks under torchrun.
#
#   launch/local.sh N RECIPE [key=value …]
#   launch/local.sh N --resume RUN_DIR [key=value …]
#
# PYTHON names the interpreter (default: python); OMP_NUM_THREADS the threads a rank (default: the cores shared out evenly).
# The exit code is that of the rank that failed first; 75: stopped by SIGTERM, SIGUSR1 or ^C, after saving.
set -euo pipefail

usage="usage: launch/local.sh N RECIPE [key=value ...]  or  launch/local.sh N --resume RUN_DIR [key=value ...]"
ranks=${1:-}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]] || (($# < 2)) || { [[ $2 == --resume ]] && (($# < 3)); }; then
    echo "error: $usage" >&2
    exit 2
fi
shift
command=train
if [[ $1 == --resume ]]; then
    command=resume
    shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "${PYTHON:-python}" -m steptron.launcher.torchrun --standalone --nproc-per-node "$ranks" -m steptron "$command" "$@"
