#!/usr/bin/env bash
# Start or resume a run on this machine, with N ranks under the launcher.
#
#   launch/local.sh N RECIPE [key=value …]
#   launch/local.sh N --resume RUN_DIR [key=value …]
#
# PYTHON is the interpreter (default: python). OMP_NUM_THREADS is the number of threads per rank (default: the cores are
# shared out evenly). If a stage needs another number of ranks than N, the launcher starts that number. The exit code is
# that of the rank that failed first; 75 means: stopped by SIGTERM, SIGUSR1 or ^C, after saving.
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
