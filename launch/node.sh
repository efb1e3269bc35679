#!/usr/bin/env bash
# Start the ranks of one node of a run on several nodes. Run it on every node; the launchers meet at MASTER_ADDR.
#
#   launch/node.sh RECIPE [key=value …]               starts the run, or continues it if its folder holds one
#   launch/node.sh --resume RUN_DIR [key=value …]
#
# NNODES             number of nodes: N, or MIN:MAX. With MIN:MAX, the ranks start again with fewer nodes when one is
#                    lost, and with more when one joins; the recipe's layout must allow it (an axis of −1 takes the
#                    remaining ranks)
# MASTER_ADDR        name or address of the node where the nodes meet, the same on all nodes. That node must not be lost
# MASTER_PORT        port on that node (default: 29400)
# IS_MASTER          true on that node, false on the others (default: true if MASTER_ADDR is a name or address of this
#                    machine)
# NODE_ADDR          address at which the other nodes reach this one (default: its host name)
# NETWORK_INTERFACE  network interface of the ranks (default: that of the host name)
# RANKS_PER_NODE     number of ranks on this node (default: the GPUs that nvidia-smi lists)
# MAX_RESTARTS       number of times that the ranks are started again after one is lost (default: 3)
# RUN_ID             a name, the same on all nodes of a run, and different for runs that meet at the same address
#                    (default: steptron)
# RENDEZVOUS         more settings of torch's c10d rendezvous, in seconds, separated by commas (defaults in brackets):
#                    last_call_timeout=60, how long a start waits for more than MIN nodes (30);
#                    read_timeout=600, how long a node waits for the launcher of MASTER_ADDR (60);
#                    join_timeout=1200, how long that launcher waits for MIN nodes (600)
# PYTHON, OMP_NUM_THREADS, LOG_DIR: as in env.sh and local.sh
#
# The exit code is that of the rank that failed first; 75 means: stopped on a signal after saving, and 76: the
# coming stage needs another number of ranks, which the error line names. It is also 1 if the nodes do not find each
# other.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}
if (($# < 1)) || { [[ $1 == --resume ]] && (($# < 2)); }; then
    fail "usage: launch/node.sh RECIPE [key=value ...]  or  launch/node.sh --resume RUN_DIR [key=value ...]"
fi
command=(train --or-resume)
if [[ $1 == --resume ]]; then
    command=(resume)
    shift
fi

[[ -n ${NNODES:-} ]] || fail "NNODES: not set; give the number of nodes, as 4 or as 2:4"
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES=$NNODES: not a number of nodes; give 4, or 2:4 for two to four"
[[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR: not set; give the name or address of the node where all nodes are to meet"
if [[ -z ${RANKS_PER_NODE:-} ]]; then
    RANKS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    ((RANKS_PER_NODE > 0)) || fail "RANKS_PER_NODE: not set, and nvidia-smi lists no GPU; give the ranks of this node"
fi
[[ $RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE=$RANKS_PER_NODE: not a number of ranks"
MAX_RESTARTS=${MAX_RESTARTS:-3}
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: not a number of restarts"
[[ ${IS_MASTER:-true} =~ ^(true|false)$ ]] || fail "IS_MASTER=$IS_MASTER: neither true nor false"

settings=${RENDEZVOUS:-}
if [[ -n ${IS_MASTER:-} ]]; then
    settings=is_host=$IS_MASTER${settings:+,$settings}
fi
ranks=$RANKS_PER_NODE
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
launcher=(
    "${PYTHON:-python}" -m steptron.launcher.torchrun
    --nnodes "$NNODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts "$MAX_RESTARTS"
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RUN_ID:-steptron}"
)
[[ -z $settings ]] || launcher+=(--rdzv-conf "$settings")
[[ -z ${NODE_ADDR:-} ]] || launcher+=(--local-addr "$NODE_ADDR")
exec "${launcher[@]}" -m steptron "${command[@]}" "$@"
