# Environment of every rank, in one place; sourced by local.sh and node.sh with $ranks set to the ranks of this machine.
# What is set already stays as it is.

# Threads a rank: the cores shared out evenly. More ranks than cores with two threads each spin against each other, ten times slower.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

# The network interface that ranks talk over, for gloo, torch's stores and NCCL. Without it gloo takes the one of the host's name.
if [[ -n ${NETWORK_INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export TP_SOCKET_IFNAME=${TP_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}
fi

# NCCL: the last 2,000 collectives of a rank are kept, and written when one of them times out, to a file a rank in LOG_DIR
# (default: /tmp). The error that names the lost rank names them; the number is the launcher's, so that they are not an earlier run's.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${LOG_DIR:-/tmp}/collectives-$$-rank-}

# torch's C++ warns of each address that has no name, and of each connection that breaks off: the one error of a lost rank says it better.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
