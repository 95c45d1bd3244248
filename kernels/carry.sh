#!/usr/bin/env bash
# Gathers what a GPU machine without a package registry needs besides its own torch: wheels, and the compiled libraries.
#
#   bash kernels/carry.sh [FOLDER]         default: kernels/carry, which git ignores
#
# Run it where packages can be installed; then copy the repository with the folder, and run kernels/gpu_suite.sh there.
#   PYTHON=python3            interpreter with pip, wheel and torch (its headers compile the libraries)
#   FOR_PYTHON=3.12           version of Python on the GPU machine, which is x86-64 Linux
#   FOR_GLIBC=2.28            its C library is at least this old
# In the folder afterwards:  wheels/  megamoe's own needs    peers/  what the benchmarks compare with    lib/  the libraries
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
FOR_PYTHON=${FOR_PYTHON:-3.12}
FOR_GLIBC=${FOR_GLIBC:-2.28}
FOLDER=${1:-kernels/carry}
readonly MOST_MIB=55
# What megamoe imports and a machine with torch rarely has. Versions: docker/constraints.txt.
readonly NEEDS=(annotated-types hjson pydantic pydantic-core)
readonly FROM_SOURCE=(deepspeed)
# Their newest releases of this line: a peer is measured at its best.
readonly PEERS=("transformer-engine>=2.20,<3" "torchtitan>=0.3,<1" "megatron-core>=0.19,<0.20")

export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'carry: %s\n' "$*"; }

download() {
    local into=$1
    shift
    local glibc platforms=(--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64)
    # pip compares these tags literally, so that every version up to the machine's own has to be named.
    for ((glibc = 18; glibc <= ${FOR_GLIBC#2.}; glibc++)); do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$FOR_PYTHON" \
        "${platforms[@]}" --dest "$into" "$@"
}

libraries() {
    say "compiling the libraries"
    "$PYTHON" kernels/build.py --out "$FOLDER/lib" || say "not compiled; the GPU machine will try"
}

main() {
    rm -rf "$FOLDER"
    mkdir -p "$FOLDER/wheels" "$FOLDER/peers"
    echo '*' >"$FOLDER/.gitignore"
    say "wheels for Python $FOR_PYTHON into $FOLDER"
    download "$FOLDER/wheels" -c docker/constraints.txt "${NEEDS[@]}"
    local peer
    for peer in "${PEERS[@]}"; do
        download "$FOLDER/peers" "$peer" || say "no wheel of $peer for Python $FOR_PYTHON: it will not be measured"
    done
    # Its optional native ops are left out: they compile themselves where they are first used.
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation -c docker/constraints.txt \
        --wheel-dir "$FOLDER/wheels" "${FROM_SOURCE[@]}"
    libraries
    rm -rf "$FOLDER/lib/stub" # stands for libtorch_cuda while linking, and must not be found when loading
    du -k "$FOLDER"/*/* | sort -n
    local mib
    mib=$(du -sm "$FOLDER" | cut -f 1)
    say "$mib MiB in $FOLDER (at most $MOST_MIB)"
    [[ -e $FOLDER/lib/libmegamoe_cuda.so ]] || say "the CUDA library is NOT among them: the GPU machine has to compile it"
    ((mib <= MOST_MIB))
}

main
