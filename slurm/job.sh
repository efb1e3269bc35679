# The course of a job, sourced by pretrain.sbatch and resume.sbatch: srun starts launch/node.sh once per node, signals
# are passed on to it, and a job that stopped on a signal is requeued.
#
#   warning USR1 or TERM ──► srun (USR1) ──► launch/node.sh ──► ranks save, exit 75 ──► scontrol requeue ──► again
#   a node is lost ──► Slurm ends the job and requeues it itself (--requeue); it continues from the last checkpoint
#   ranks are lost more often than MAX_RESTARTS ──► scontrol requeue, unless it failed soon (RETRY_AFTER)
#
# RANKS_PER_NODE  number of ranks per node (default: its GPUs, or 1 if it has none)
# MIN_NODES       number of nodes with which the job continues when others are lost, without a requeue; requires
#                 sbatch --no-kill (default: all nodes)
# RETRY_AFTER     seconds that an attempt must have lasted to be requeued after a rank or node was lost for good (exit
#                 codes 1 and 128 + n; default: 1800): an attempt that fails sooner would only fail again
# LOG_DIR         folder for the output of the nodes, with one folder per attempt (default: logs/NAME-JOB where sbatch
#                 was called). The log of each rank is in the run folder
# STEPTRON_ROOT   the repository (default: the folder in which sbatch was called)
# MASTER_ADDR     address where the nodes meet (default: the job's first node); MASTER_PORT (default: from the job number)
# PYTHON, OMP_NUM_THREADS, NETWORK_INTERFACE, MAX_RESTARTS, RENDEZVOUS, NODE_ADDR: as in launch/node.sh

# run_job SCRIPT RECIPE|RUN_DIR ARGUMENT…: run the job of SCRIPT.sbatch with its arguments.
run_job() {
    local script=$1 what=$2 dry_run=false
    shift 2
    if [[ ${1:-} == --dry-run ]]; then
        dry_run=true
        shift
    fi
    if (($# < 1)) || [[ $1 == -* ]]; then
        echo "error: usage: sbatch slurm/$script.sbatch [--dry-run] $what [key=value ...]" >&2
        exit 2
    fi
    [[ $what == RECIPE ]] || set -- --resume "$@"

    local nodes=${SLURM_JOB_NUM_NODES:-1} attempt=${SLURM_RESTART_COUNT:-0}
    export NNODES=${MIN_NODES:+$MIN_NODES:}$nodes
    export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=127.0.0.1
        if ((nodes > 1)); then
            local hosts
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
            MASTER_ADDR=${hosts%%$'\n'*}
        fi
    fi
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
    export RUN_ID=${SLURM_JOB_ID:-0}-$attempt
    export LOG_DIR=${LOG_DIR:-logs/${SLURM_JOB_NAME:-steptron}-${SLURM_JOB_ID:-0}}/attempt-$attempt

    # Only the task knows its node's number, so a shell in the task decides whether it is the first. The first one also
    # records its launcher's exit code, because srun's is that of a lost node, even if the other nodes finished. The
    # shell receives signals too.
    local task='
        if ((SLURM_NODEID)); then IS_MASTER=false exec "$0" "$@"; fi
        trap : USR1 TERM
        IS_MASTER=true "$0" "$@"
        code=$?
        echo $code >"$LOG_DIR/exit-code"
        exit $code'
    local patience=600 # seconds for the other nodes after the first has ended: more than launchers take to agree on the end
    local elastic=()
    if [[ -n ${MIN_NODES:-} ]]; then
        patience=0 # no limit
        elastic=(--no-kill)
    fi
    local step=(
        srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=0 --wait="$patience" "${elastic[@]}"
        --output="$LOG_DIR/node-%n.log" --open-mode=append bash -c "$task" "$root/launch/node.sh" "$@"
    )
    if $dry_run; then
        local name
        for name in NNODES RANKS_PER_NODE MASTER_ADDR MASTER_PORT RUN_ID LOG_DIR; do
            echo "export $name=${!name@Q}"
        done
        echo "${step[@]@Q}"
        return
    fi

    mkdir -p "$LOG_DIR"
    rm -f "$LOG_DIR/exit-code"
    echo "attempt $attempt: $nodes nodes, output in $LOG_DIR"
    local may_requeue=false code=0 srun=
    # On TERM, srun would kill its tasks before they have saved, so it gets USR1.
    trap 'may_requeue=true; [[ -z $srun ]] || kill -USR1 "$srun" || true' USR1 TERM
    "${step[@]}" &
    srun=$!
    # Pass on a warning that came before srun's process id was known. Before srun runs, its process would lose it.
    if $may_requeue; then
        sleep 2
        kill -USR1 "$srun" || true
    fi
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" || true # a trap ends the wait early
    done
    wait "$srun" || code=$?
    trap - USR1 TERM
    if [[ -s $LOG_DIR/exit-code ]]; then
        code=$(<"$LOG_DIR/exit-code")
    fi
    if ((SECONDS >= ${RETRY_AFTER:-1800})); then
        may_requeue=true
    fi
    if ((code != 0 && code != 75)); then
        grep -h '^error' "$LOG_DIR"/node-*.log | sort -u | head -n 8 >&2 || true
    fi
    if ((code == 75)) || { $may_requeue && ((code != 0 && code != 2 && code != 3)); }; then
        requeue
    fi
    return "$code"
}

# Requeue this job, unless scancel has ended it.
requeue() {
    local state
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' || true)
    if [[ $state != JobState=RUNNING ]]; then
        echo "not requeued: the job is ${state#JobState=}"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "requeued: the run will continue from its last checkpoint"
    else
        echo "error: scontrol requeue $SLURM_JOB_ID failed; submit the job again to continue the run from its last checkpoint" >&2
    fi
}
