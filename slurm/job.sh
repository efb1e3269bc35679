# The course of a job, sourced by pretrain.sbatch and resume.sbatch: srun starts launch/node.sh once per node, signals
# are passed on to it, and a job that stopped on a signal is requeued.
#
#   warning USR1 or TERM ──► srun (USR1) ──► launch/node.sh ──► ranks save, exit 75 ──► scontrol requeue ──► again
#   a node is lost ──► Slurm ends the job and requeues it itself (--requeue); it continues from the last checkpoint
#   ranks are lost more often than MAX_RESTARTS ──► scontrol requeue, unless it failed soon (RETRY_AFTER)
#   a stage needs another number of ranks ──► ranks save, exit 76 ──► srun again in this job, on as many nodes as it
#   needs; if the job has too few nodes, a follow-on job with enough of them and with this job's other options
#
# Ask for the nodes of the largest stage to have no queue between stages.
#
# RANKS_PER_NODE  largest number of ranks per node (default: its GPUs, or 1 if it has none)
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
    local words=("$@")
    [[ $what == RECIPE ]] || words=(--resume "$@")

    local name unset=(-u SLURM_RESTART_COUNT) given=() # the environment of a follow-on job
    for name in NNODES RANKS_PER_NODE MASTER_ADDR MASTER_PORT RUN_ID LOG_DIR STEPTRON_NEXT; do
        if [[ -v $name ]]; then given+=("$name=${!name}"); else unset+=(-u "$name"); fi
    done
    local allocated=${SLURM_JOB_NUM_NODES:-1} attempt=${SLURM_RESTART_COUNT:-0} part=0
    local nodes=$allocated most=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export RANKS_PER_NODE=$most NNODES=${MIN_NODES:+$MIN_NODES:}$nodes
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
    export STEPTRON_NEXT=$LOG_DIR/next
    local step
    make_step
    if $dry_run; then
        for name in NNODES RANKS_PER_NODE MASTER_ADDR MASTER_PORT RUN_ID LOG_DIR STEPTRON_NEXT; do
            echo "export $name=${!name@Q}"
        done
        echo "${step[@]@Q}"
        return
    fi

    mkdir -p "$LOG_DIR"
    echo "attempt $attempt: $nodes nodes, output in $LOG_DIR"
    local may_requeue=false code=0
    run_step
    while ((code == 76)) && ! $may_requeue && change_ranks; do
        make_step
        run_step
    done
    if ((SECONDS >= ${RETRY_AFTER:-1800} && code != 76)); then # with 76, another job follows, or the user must act
        may_requeue=true
    fi
    if ((code != 0 && code != 75 && code != 76)); then
        grep -h '^error' "$LOG_DIR"/node-*.log | sort -u | head -n 8 >&2 || true
    fi
    if ((code == 75)) || { $may_requeue && ((code != 0 && code != 2 && code != 3)); }; then
        requeue
    fi
    return "$code"
}

# Set `step` to the command that starts $words on $nodes nodes.
make_step() {
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
    local more=()
    if [[ $NNODES == *:* ]]; then
        patience=0 # no limit
        more=(--no-kill)
    fi
    ((nodes == allocated)) || more+=(--relative 0) # from the first node on, which is MASTER_ADDR
    step=(
        srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=0 --wait="$patience" "${more[@]}"
        --output="$LOG_DIR/node-%n.log" --open-mode=append bash -c "$task" "$root/launch/node.sh" "${words[@]}"
    )
}

# Run `step`. Sets `code` to the exit code of the first node's launcher, and `may_requeue` if the job was warned.
run_step() {
    local srun=
    code=0
    rm -f "$LOG_DIR/exit-code" "$STEPTRON_NEXT"
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
}

# Set nodes, ranks per node and `words` to what the ranks have asked for. If the job has too few nodes, submit another
# job, or say why not, and return 1.
change_ranks() {
    [[ -s $STEPTRON_NEXT ]] || return 1
    local wanted ranks per_node=$most
    mapfile -t wanted <"$STEPTRON_NEXT"
    ranks=${wanted[0]}
    while ((ranks % per_node)); do
        ((per_node -= 1))
    done
    if ((ranks / per_node > allocated)); then
        follow_on "$((ranks / per_node))" "${wanted[1]}"
        return 1
    fi
    nodes=$((ranks / per_node))
    [[ -z ${wanted[1]} ]] || words=(--resume "${wanted[1]}")
    ((part += 1))
    export RANKS_PER_NODE=$per_node NNODES=$nodes RUN_ID=${SLURM_JOB_ID:-0}-$attempt-$part
    echo "another number of ranks: $ranks on $nodes nodes"
}

# follow_on NODES RUN_DIR: submit a job that continues the run on that many nodes when this one has ended.
follow_on() {
    if [[ -z $2 ]]; then
        echo "error: the coming stage needs $1 nodes with at most $most ranks each, the job has $allocated; call sbatch --nodes $1" >&2
        return
    fi
    local shown pair value options=()
    shown=$(scontrol --oneliner show job "$SLURM_JOB_ID" || true)
    for pair in JobName=job-name Partition=partition Account=account QOS=qos TimeLimit=time TresPerNode=gres \
        CPUs/Task=cpus-per-task MinMemoryNode=mem MinMemoryCPU=mem-per-cpu Features=constraint Reservation=reservation; do
        value=$(grep -oE "(^| )${pair%=*}=[^ ]+" <<<"$shown" || true)
        value=${value#*=}
        value=${value#gres[:/]}
        [[ -z $value || $value == "(null)" || $value == N/A ]] || options+=("--${pair#*=}=$value")
    done
    options+=(--nodes="$1" --dependency="afterany:$SLURM_JOB_ID")
    if ! env "${unset[@]}" "${given[@]}" sbatch "${options[@]}" "$root/slurm/resume.sbatch" "$2"; then
        echo "error: sbatch failed; continue the run with: sbatch ${options[*]@Q} slurm/resume.sbatch ${2@Q}" >&2
    fi
}

# Requeue this job, unless scancel has ended it.
requeue() {
    local state
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' || true)
    if [[ $state != JobState=RUNNING ]]; then
        echo "not requeued: the job is ${state#JobState=}"
        return
    fi
    # Slurm may kill this script before scontrol returns: what follows it is not always printed.
    echo "requeueing: the run will continue from its last checkpoint"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        echo "error: scontrol requeue $SLURM_JOB_ID failed; submit the job again to continue the run from its last checkpoint" >&2
    fi
}
