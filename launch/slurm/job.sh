# What the scripts for sbatch share: start the program on every task, and decide what becomes of the job when it ends.
# Variables that are read, to be given before sbatch (which passes them on):
#
#   MAX_RESTARTS=100      how often a job is queued again before it stays ended
#   PREFLIGHT=1           check the nodes first (megamoe preflight), or its options: PREFLIGHT="--min-bandwidth 20"
#   PYTHON=...            the interpreter (default: the checkout's .venv, else python3)
#   CONTAINER=image       run inside of it, with CONTAINER_RUNTIME=pyxis (default), enroot or podman, and
#                         CONTAINER_MOUNTS=/data,/scratch besides this checkout and the folder of submission
#   MEGAMOE_ROOT=...      the checkout, where it cannot be seen from the script's path
#   MASTER_ADDR, MASTER_PORT    where the ranks meet (default: the first node, a port that follows from the job's number)
# shellcheck shell=bash

# 75, EX_TEMPFAIL of sysexits.h: asked to stop, saved, start me again. The others are 128 + SIGUSR1 and 128 + SIGTERM: asked
# so early that there was nothing to save.
readonly REQUEUE=75 REQUEUE_EARLY=138 REQUEUE_EARLY_TOO=143 NODES_REFUSED=3
readonly RESTARTS=${SLURM_RESTART_COUNT:-0}

# shellcheck source=launch/slurm/env.sh
source "$MEGAMOE_ROOT/launch/slurm/env.sh"

say() { printf '%s job %s: %s\n' "$(date +%H:%M:%S)" "$SLURM_JOB_ID" "$*"; }

# Not by the job's number: the number of one task of an array stands for the whole array.
this_job() {
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# How every task is started: `start`, and in it `program`, up to the words of the script.
prepare_start() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR="${MASTER_ADDR:-${first%%$'\n'*}}"
    # srun takes it from no other variable.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export PYTHONPATH="$MEGAMOE_ROOT${PYTHONPATH:+:$PYTHONPATH}"

    # One rank that leaves must not take the others with it at once: each of them has to leave with its own code for the
    # highest to be 75, and after a failure they have a minute to say whom they lost.
    start=(srun --kill-on-bad-exit=0 --wait=60 --distribution=block)
    program=()
    local python=${PYTHON:-python3}
    if [[ -n ${CONTAINER:-} ]]; then
        enter_container
    elif [[ -z ${PYTHON:-} && -x $MEGAMOE_ROOT/.venv/bin/python ]]; then
        python=$MEGAMOE_ROOT/.venv/bin/python
    fi
    program+=("$python")
}

enter_container() {
    local folder folders mounts=()
    IFS=, read -ra folders <<<"$MEGAMOE_ROOT,$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    case ${CONTAINER_RUNTIME:-pyxis} in
        pyxis)
            for folder in "${folders[@]}"; do mounts+=("$folder:$folder"); done
            mounts=("$(IFS=, && echo "${mounts[*]}")")
            start+=("--container-image=$CONTAINER" "--container-mounts=${mounts[0]}" "--container-workdir=$PWD")
            ;;
        enroot)
            for folder in "${folders[@]}"; do mounts+=(--mount "$folder:$folder"); done
            # shellcheck disable=SC2016  # expanded inside of the container
            program+=(enroot start "${mounts[@]}" "$CONTAINER" sh -c 'cd "$1" && shift && exec "$@"' - "$PWD")
            ;;
        podman)
            for folder in "${folders[@]}"; do mounts+=(--volume "$folder:$folder"); done
            # The ranks of a node share memory, processes and network as they do outside; root inside is the user outside.
            program+=(podman run --rm --user 0 --network=host --ipc=host --pid=host "${mounts[@]}" --workdir "$PWD")
            program+=(--env 'SLURM_*' --env 'MASTER_*' --env 'NCCL_*' --env 'TORCH_*' --env 'GLOO_*')
            program+=(--env 'MEGAMOE_*' --env 'CUDA_*' --env 'OMP_*' --env 'DS_*' --env PYTHONPATH --env RANK --env WORLD_SIZE)
            [[ ! -e /dev/nvidiactl ]] || program+=(--device nvidia.com/gpu=all)
            program+=("$CONTAINER")
            ;;
        *)
            say "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is none of pyxis, enroot, podman"
            exit 2
            ;;
    esac
}

# A task of an array is the run with its number as seed, in a folder of its own.
words_of_this_seed() {
    local word folder=runs/$SLURM_JOB_NAME
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || return 0
    for word in "$@"; do
        [[ $word != training.output_dir=* ]] || folder=${word#*=}
    done
    seed=("training.seed=$SLURM_ARRAY_TASK_ID" "training.output_dir=$folder/seed_$SLURM_ARRAY_TASK_ID")
}

# Of another launch, in whose environment the job was submitted; srun numbers the ranks here.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

run_job() { # SCRIPT WORDS...
    local script=$MEGAMOE_ROOT/$1 code=0 seed=() start=() program=()
    shift
    # Told to end, this shell waits for its ranks, which were told as well and are about to save.
    trap : TERM USR1
    say "start $((RESTARTS + 1)) of at most $((${MAX_RESTARTS:-100} + 1)) on $SLURM_JOB_NODELIST"
    prepare_start
    words_of_this_seed "$@"
    # What is wrong with the configuration is said once, and not by every rank.
    RANK=0 WORLD_SIZE=$SLURM_NTASKS "${start[@]}" --nodes=1 --ntasks=1 "${program[@]}" \
        "$script" "$@" "${seed[@]}" --dry-run >/dev/null || failed $?
    check_nodes
    use_another_step_number
    "${start[@]}" "${program[@]}" "$script" "$@" "${seed[@]}" || code=$?
    case $code in
        0) say "finished" ;;
        "$REQUEUE") queue_again "asked to stop, and saved" "$code" ;;
        "$REQUEUE_EARLY" | "$REQUEUE_EARLY_TOO") queue_again "asked to stop before it trained" "$code" ;;
        *)
            local lost
            lost=$(silent_nodes)
            [[ -z $lost ]] || queue_again "no answer from $lost" "$code"
            failed "$code"
            ;;
    esac
}

failed() { # CODE
    say "failed with exit code $1; the reason is above (codes from 129 on: a rank was ended by signal code - 128)"
    exit "$1"
}

check_nodes() {
    local code=0 options=()
    [[ -n ${PREFLIGHT:-} ]] || return 0
    [[ $PREFLIGHT == 1 ]] || read -ra options <<<"$PREFLIGHT"
    "${start[@]}" "${program[@]}" -m megamoe preflight "${options[@]}" || code=$?
    ((code == 0)) && return
    ((code != NODES_REFUSED)) || say "nodes are refused; submit again without them (--exclude, names above)"
    exit "$code"
}

# A job counts its steps from 0 again when it restarts, and SLURM may still be trying to end a step of the start before on a
# node that did not answer: it must not find the training under the same number.
use_another_step_number() {
    local number
    for ((number = 0; number < RESTARTS % 8; number++)); do
        srun --nodes=1 --ntasks=1 true || true
    done
}

# The nodes of this job that start no program any more. SLURM itself may take minutes to miss them (SlurmdTimeout).
silent_nodes() {
    local node names=() probes=() silent=()
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for node in "${names[@]}"; do
        timeout --kill-after=5 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true >/dev/null 2>&1 &
        probes+=($!)
    done
    for node in "${!names[@]}"; do
        wait "${probes[node]}" || silent+=("${names[node]}")
    done
    echo "${silent[*]}"
}

queue_again() { # WHY CODE
    # A job that somebody cancelled has ended for SLURM, although its last processes have not; it would start again, too.
    local state
    state=$(squeue --noheader --format=%T --job="$(this_job)")
    if [[ $state != RUNNING ]]; then
        say "$1; SLURM had ended the job itself ($state: cancelled, or over its time, or a dead node), and decides what follows"
    elif ((RESTARTS >= ${MAX_RESTARTS:-100})); then
        say "$1; not queued again after $RESTARTS restarts (MAX_RESTARTS)"
    elif scontrol requeue "$(this_job)"; then
        say "$1; queued again"
    else
        say "$1; this cluster does not let it queue again: submit it once more to go on"
    fi
    exit "$2"
}
