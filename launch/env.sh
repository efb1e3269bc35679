# Environment of every rank, sourced by local.sh and node.sh with $ranks set to the number of ranks on this machine.
# Variables that are already set are not changed.

# Threads per rank: the cores are shared out evenly. If ranks × threads exceed the cores, threads spin against each
# other, which is ten times slower.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
    export STEPTRON_CORES=$cores # the launcher shares them out again if a stage needs another number of ranks
fi

# The network interface of gloo, torch's stores and NCCL. If it is not set, gloo uses the one of the host name.
if [[ -n ${NETWORK_INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export TP_SOCKET_IFNAME=${TP_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}
fi

# NCCL: torch keeps the last 2,000 collectives of each rank. If one times out, it writes them to one file per rank in
# LOG_DIR (default: /tmp). The error that names the lost rank also names these files. Their names contain the launcher's
# process id, so that they are not mistaken for those of an earlier run.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-${LOG_DIR:-/tmp}/collectives-$$-rank-}

# CUDA: freed memory of one size serves another one, so that micro-batches of changing shapes do not fragment it. Each
# stream (computation, FSDP, expert exchange, pipeline, copies) has a queue of its own, so that none waits for another.
if [[ -z ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-} ]]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}

# torch's C++ code warns of each address without a name and of each broken connection. The one error of a lost rank is
# clearer, so these warnings are off.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
