#!/usr/bin/env bash
# Everything that only a GPU can show, in less than 9 minutes: tests on CUDA, memory and race checkers, ceilings, ops, the
# MoE layer, other implementations, training, the exchange without messages.
#
#   bash kernels/gpu_suite.sh OUT            on a machine with one NVIDIA GPU, torch and nvcc, without a package registry
#   bash kernels/gpu_suite.sh OUT --smoke    every step in tiny sizes on a CPU: does it run? Gives no numbers
#
# Wheels and libraries are taken from kernels/carry (CARRY=FOLDER), made by `bash kernels/carry.sh`; what is installed is
# used where they are missing. Into OUT: result.json (kernels/results/README.md), tables.md, logs.tar.gz; renewed after
# every step, so that a run that is cut short leaves what it has. Settings of the card are read, never changed.
#   PYTHON=python3            interpreter with torch
#   BUDGET=520                seconds for all steps; what does not fit is not run
#   STEPS="tests ops"         only these (default: all of them, in this order)
set -uo pipefail

readonly ALL_STEPS="environment install library conditions data tests memcheck racecheck ceilings ops layer tiny 1b peers push"
die() {
    printf 'gpu_suite: %s\n' "$*" >&2
    exit 2
}

OUT="" SMOKE=()
for word in "$@"; do
    case $word in
    --smoke) SMOKE=(--smoke) ;;
    -*) die "unknown option $word; usage: bash kernels/gpu_suite.sh OUT [--smoke]" ;;
    *) OUT=$word ;;
    esac
done
[[ -n $OUT ]] || die "where to? usage: bash kernels/gpu_suite.sh OUT [--smoke]"
mkdir -p "$OUT" || die "cannot make $OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
ROOT=$PWD

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-520}
STEPS=${STEPS:-$ALL_STEPS}
CARRY=${CARRY:-$ROOT/kernels/carry}
[[ -d $CARRY ]] && CARRY=$(cd "$CARRY" && pwd)
WORK=$(mktemp -d)
PREPARING=""
trap '[[ -n $PREPARING ]] && kill "$PREPARING" 2>/dev/null; rm -rf "$WORK"' EXIT
mkdir -p "$WORK/logs" "$WORK/parts" "$WORK/runs" "$WORK/site" "$WORK/peers"
: >"$WORK/steps.tsv"

export PYTHONPATH=$ROOT:$ROOT/kernels:$WORK/site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCH_EXTENSIONS_DIR=$WORK/extensions TRITON_CACHE_DIR=$WORK/triton
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PIP_DISABLE_PIP_VERSION_CHECK=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
TIMES=1
((${#SMOKE[@]})) && export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu && TIMES=5
BUDGET=$((BUDGET * TIMES))
if [[ -z ${MEGAMOE_KERNELS_LIB:-} && -f $CARRY/lib/build.json ]]; then
    export MEGAMOE_KERNELS_LIB=$CARRY/lib
fi

# step NAME SECONDS COMMAND...: run it with a limit of its own and a log of its own; a failure does not stop the next one.
step() {
    local name=$1 limit=$(($2 * TIMES)) began=$SECONDS status=ok code=0
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return 0
    ((limit > BUDGET - SECONDS)) && limit=$((BUDGET - SECONDS))
    if ((limit < 5)); then
        status="not run: no time left"
    else
        timeout --kill-after=5 "$limit" "$@" >"$WORK/logs/$name.log" 2>&1 || code=$?
        case $code in
        0) ;;
        75) status="not run: $(tail -n 1 "$WORK/logs/$name.log")" ;;
        124 | 137) status="stopped after $limit s" ;;
        *) status="failed ($code)" ;;
        esac
    fi
    local last
    last=$(tail -n 1 "$WORK/logs/$name.log" 2>/dev/null | tr -cd '[:print:]' | cut -c 1-160)
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$last" >>"$WORK/steps.tsv"
    printf '%-12s %4d s  %s\n' "$name" "$((SECONDS - began))" "$status"
    [[ $status == ok ]] || tail -n 3 "$WORK/logs/$name.log" 2>/dev/null | cut -c 1-200 | sed 's/^/      /'
    pack
}

# After every step, so that OUT is never behind.
pack() {
    "$PYTHON" -m kernels.bench.results "$WORK/parts" --out "$OUT/result.json" --steps "$WORK/steps.tsv" "${SMOKE[@]}" &&
        "$PYTHON" -m kernels.bench.table --show "$OUT/result.json" >"$OUT/tables.md"
    cp "$WORK"/parts/*.txt "$WORK/logs/" 2>/dev/null
    tar -czf "$OUT/logs.tar.gz" -C "$WORK" logs
}

skip() {
    printf '%s\n' "$*"
    exit 75
}

environment() {
    nvidia-smi
    nvcc --version
    df -h "$WORK"
    free -g
    "$PYTHON" -m torch.utils.collect_env || "$PYTHON" -VV
    "$PYTHON" -m pip list 2>/dev/null
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "sees a GPU:", torch.cuda.is_available())'
}

install() {
    compgen -G "$CARRY/wheels/*.whl" >/dev/null || skip "no wheels in $CARRY/wheels; using what is installed"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$WORK/site" "$CARRY"/wheels/*.whl
    local wheel
    for wheel in "$CARRY"/peers/*.whl; do
        # Unpacked, not installed: what belongs to one peer must not be seen by the others.
        [[ -e $wheel ]] && "$PYTHON" -m zipfile -e "$wheel" "$WORK/peers/$(basename "$wheel" | cut -d - -f 1)"
    done
    "$PYTHON" -c 'import deepspeed, pydantic; print("deepspeed", deepspeed.__version__, "pydantic", pydantic.__version__)'
}

# The libraries that were carried along, else compiled here; the next steps read their place from a file.
library() {
    load() { "$PYTHON" -c 'import json, megamoe_kernels as k; k.load(); print(json.dumps(k.what(), indent=1))'; }
    echo "MEGAMOE_KERNELS_LIB=${MEGAMOE_KERNELS_LIB:-}"
    "$PYTHON" -m megamoe doctor || true
    if load && works; then
        echo "${MEGAMOE_KERNELS_LIB:-}" >"$WORK/lib"
        return
    fi
    echo "not usable as it is; compiling"
    "$PYTHON" kernels/build.py --out "$WORK/built" || return
    export MEGAMOE_KERNELS_LIB=$WORK/built
    load && works || return
    echo "$WORK/built" >"$WORK/lib"
}

# Whether an op runs on the device that the suite is about.
works() {
    "$PYTHON" - "${SMOKE[@]}" <<'PY'
import sys

import megamoe_kernels
import torch

megamoe_kernels.load()
device = "cpu" if "--smoke" in sys.argv else "cuda"
experts = torch.randint(4, (64, 2), device=device)
place, source, counts = torch.ops.megamoe.plan(experts, 4)
assert torch.equal(counts.cpu(), torch.bincount(experts.flatten().cpu(), minlength=4)), counts
print("plan runs on", device)
PY
}

prepare_data() {
    "$PYTHON" -m megamoe data prepare --config configs/tiny.yaml "data.prepared_dir=$WORK/data"
}

tests() {
    local parallel=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 4)
    if ((${#SMOKE[@]})); then
        "$PYTHON" -m pytest tests/kernels -m gpu --collect-only -q -p no:cacheprovider
        "$PYTHON" -m pytest tests/kernels -m "not gpu" -q -p no:cacheprovider --ignore tests/kernels/test_bench.py
        return
    fi
    "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider -m gpu "${parallel[@]}"
}

checker() {
    if ((${#SMOKE[@]})); then
        "$PYTHON" -m kernels.bench.sanitize --smoke || return
        skip "no GPU (the driver alone ran on the CPU)"
    fi
    command -v compute-sanitizer >/dev/null || skip "compute-sanitizer is not installed"
    # Our kernels only, all of which are in namespace mm: instrumenting torch's would take most of the time.
    compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kernel_substring=_ZN2mm \
        "$PYTHON" -m kernels.bench.sanitize 2>&1 | tee "$WORK/$1.txt"
    local code=${PIPESTATUS[0]}
    ((code == 0)) || return "$code"
    # A program that ended before it used the GPU passes every checker.
    grep -q ' runs, 0 not ok$' "$WORK/$1.txt"
}

bench() { "$PYTHON" -m "kernels.bench.$1" --out "$WORK/parts" "${SMOKE[@]}" "${@:2}"; }

peers() {
    local group failed=0
    # Most in a process of their own, which sees no other peer's package and takes no other down with it.
    for group in megamoe "torch torch_gather" transformer_engine torchtitan megatron_core autoep; do
        # shellcheck disable=SC2086  # names, not a file
        PYTHONPATH=$PYTHONPATH:$WORK/peers/$group timeout --kill-after=5 "$((45 * TIMES))" \
            "$PYTHON" -m kernels.bench.peers.run $group --out "$WORK/parts" "${SMOKE[@]}" ||
            { echo "$group: ended with $?" && failed=1; }
    done
    return "$failed"
}

train() {
    [[ -e $WORK/data/manifest.json ]] || { echo "the data were not prepared: see prepare.log" && return 1; }
    bench train "$1" --runs "$WORK/runs" --seconds "$(($2 * TIMES))" "data.prepared_dir=$WORK/data"
}

# Functions run under `timeout` in a shell of their own.
export PYTHON CARRY WORK ROOT TIMES
in_shell() {
    local body
    body=$(declare -f skip environment install library works prepare_data tests checker bench peers train)
    echo "set -uo pipefail; $(declare -p SMOKE); $body; $*"
}

if ! ((${#SMOKE[@]})); then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "torch of $PYTHON sees no GPU; --smoke runs everything small on the CPU"
fi

step environment 40 bash -c "$(in_shell environment)"
step install 60 bash -c "$(in_shell install)"
step library 150 bash -c "$(in_shell library)"
[[ -e $WORK/lib ]] && MEGAMOE_KERNELS_LIB=$(<"$WORK/lib") && export MEGAMOE_KERNELS_LIB
step conditions 30 bash -c "$(in_shell bench conditions)"
# On the CPU, beside steps that use the GPU and whose time does not matter.
if [[ " $STEPS " == *" data "* ]]; then
    timeout --kill-after=5 "$((200 * TIMES))" bash -c "$(in_shell prepare_data)" >"$WORK/logs/prepare.log" 2>&1 &
    PREPARING=$!
fi
step tests 110 bash -c "$(in_shell tests)"
step memcheck 60 bash -c "$(in_shell checker memcheck)"
step racecheck 60 bash -c "$(in_shell checker racecheck)"
[[ -n $PREPARING ]] && step data 120 bash -c "tail --pid=$PREPARING -f /dev/null; test -e $WORK/data/manifest.json"
step ceilings 40 bash -c "$(in_shell bench ceilings)"
step ops 90 bash -c "$(in_shell bench ops)"
step layer 60 bash -c "$(in_shell bench layer)"
step tiny 60 bash -c "$(in_shell train tiny 55)"
step 1b 110 bash -c "$(in_shell train 1b 105)"
step peers 150 bash -c "$(in_shell peers)"
step push 150 bash -c "$(in_shell bench push)"

printf '\n'
cat "$OUT/tables.md"
printf '\n'
awk -F '\t' '{ printf "%-12s %4d s  %-10s %s\n", $1, $3, $2, $4 }' "$WORK/steps.tsv"
printf 'total %d s; %s/{result.json,tables.md,logs.tar.gz}\n' "$SECONDS" "$OUT"
! cut -f 2 "$WORK/steps.tsv" | grep -q '^failed\|^stopped'
