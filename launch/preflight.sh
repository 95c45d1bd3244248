#!/usr/bin/env bash
# Checks the nodes of a cluster before a long training: versions, GPUs, disks and clocks, the bandwidth between all of them,
# and whether a parallel layout trains the same model as one process. Names the bad nodes and leaves with code 3.
#
#   bash launch/preflight.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 -- --min-bandwidth 20 --refused bad_nodes
#   sbatch --exclude="$(cat bad_nodes)" launch/slurm/pretrain.sbatch ...
#   bash launch/preflight.sh                       inside of a SLURM allocation; else on this machine alone
#   bash launch/preflight.sh --hostfile=hosts --   without SLURM, as deepspeed --hostfile starts it
#
# Before --: options of srun (or deepspeed). Behind it, or without it: those of python -m megamoe preflight, see --help there.
#   PYTHON=...      the interpreter (default: the checkout's .venv, else python3)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/slurm/env.sh
source "$root/launch/slurm/env.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python

options=()
if [[ " $* " == *" -- "* ]]; then
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
fi

if [[ ${options[0]:-} == --hostfile* ]]; then
    hosts=${options[0]#--hostfile}
    hosts=${hosts#=}
    [[ -r ${hosts:=${options[1]:-}} ]] || {
        printf '%s\n  got: %s\n  expected: %s\n' "The hostfile cannot be read." "$hosts" "lines such as: node1 slots=8" >&2
        exit 2
    }
    start=("$python" -m deepspeed.launcher.runner "${options[@]}" --module)
elif [[ -n ${SLURM_JOB_ID:-} ]] || ((${#options[@]})); then
    # A rank that leaves must not take the others with it, which are about to say what they found.
    start=(srun --kill-on-bad-exit=0 --wait=60 --distribution=block "${options[@]}" "$python" -m)
else
    gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || true
    start=("$python" -m torch.distributed.run --nproc-per-node "$((gpus > 0 ? gpus : 2))" -m)
fi
exec "${start[@]}" megamoe preflight "$@"
