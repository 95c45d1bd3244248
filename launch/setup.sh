#!/usr/bin/env bash
# Makes .venv and installs megamoe into it, with the exact versions of docker/constraints.txt; where a C++ compiler is,
# the compiled ops of kernels/ as well.
#
#   bash launch/setup.sh [extra ...]        extras of pyproject.toml: test, dev, monitor, bench
#
# Runs again in a moment when nothing changed, and picks up where it stopped when it was interrupted.
#   PYTHON=python3.12        the interpreter to build on (default: the first of 3.11 and 3.12 that works)
#   MEGAMOE_SYSTEM_SITE=1    use the torch that the interpreter already has (NGC container, cluster module)
#   MEGAMOE_KERNELS_CUDA=1   compile the ops for CUDA too, with nvcc (default: where an NVIDIA GPU is; 0: never)
#   MEGAMOE_KERNELS_REQUIRE=1   stop where compiled ops would be left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv CONSTRAINTS=docker/constraints.txt
readonly LOG=$VENV/setup.log STAMP=$VENV/setup.stamp
readonly SEALED=$VENV/sealed # docker/Dockerfile makes it: everything is installed, and not for changing
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

# DeepSpeed comes as source: build none of its optional native ops, they compile themselves when first used.
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*"; }

# die WHAT GOT EXPECTED TODO: the same four parts as the errors of the package, and the same exit code.
die() {
    printf '%s\n  got: %s\n  expected: %s\n  to do: %s\n' "$@" >&2
    exit 2
}

python_is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        python_is_usable "$PYTHON" || die "PYTHON names an interpreter that cannot be used." \
            "$PYTHON ($("$PYTHON" --version 2>&1 | tail -1 || true))" "Python 3.11 or 3.12 with its venv module" \
            "point PYTHON at such an interpreter, or unset it"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if python_is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "No usable Python was found." "$(python3 --version 2>&1 | tail -1 || true)" \
        "python3.11 or python3.12 on the PATH, with its venv module" \
        "install one (Debian: apt install python3.11-venv), or set PYTHON=/path/to/python3.11"
}

# Everything that decides what gets installed. A change of any of it makes the next run install again.
fingerprint() {
    {
        cat pyproject.toml "$CONSTRAINTS" launch/setup.sh
        "$VENV/bin/python" --version
        echo "system site: ${MEGAMOE_SYSTEM_SITE:-0}, gpu: $(has_gpu && echo yes || echo no)"
        pwd
    } | cksum | tr ' ' -
}

# Everything that decides what the compiled ops become.
kernels_fingerprint() {
    {
        find kernels/*.py kernels/pyproject.toml kernels/csrc kernels/stub kernels/megamoe_kernels/*.py -type f -print0 |
            sort -z | xargs -0 cksum
        compiler --version || true
        { wants_cuda && nvcc --version; } || true
        echo "${CXX:-} ${CUDACXX:-} ${MEGAMOE_KERNELS_CUDA_ARCHS:-} ${MEGAMOE_KERNELS_REQUIRE:-0}"
    } 2>&1 | cksum | tr ' ' -
}

# compiler ARGUMENT...: call the C++ compiler; fails where there is none.
compiler() {
    local candidate
    for candidate in ${CXX:-g++ c++ clang++}; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" "$@"
        return
    done
    return 1
}

wants_cuda() {
    case ${MEGAMOE_KERNELS_CUDA:-} in
        0) return 1 ;;
        1) return 0 ;;
        *) has_gpu ;;
    esac
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

make_venv() {
    if [[ -x $VENV/bin/python ]] && python_is_usable "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    local options=(--clear)
    [[ ${MEGAMOE_SYSTEM_SITE:-0} == 1 ]] && options+=(--system-site-packages)
    "$python" -m venv "${options[@]}" "$VENV"
}

pip_install() { "$VENV/bin/python" -m pip install --progress-bar off "$@" >>"$LOG" 2>&1; }

fail_with_log() {
    tail -n 25 "$LOG" >&2
    die "Installing $1 failed." "the messages above (all of them: $LOG)" "pip ends without an error" \
        "check the network and the package index, then run this script again"
}

# The CPU build where no NVIDIA GPU is: it is several GB smaller. Installed before anything else can pull in another torch;
# without its dependencies, which follow, pinned, with everything else.
install_torch() {
    local pin=$1
    if has_gpu; then
        say "installing $pin (NVIDIA GPU found)"
        pip_install --no-deps "$pin" || fail_with_log torch
        return
    fi
    say "installing $pin, CPU build (no NVIDIA GPU found)"
    pip_install --no-deps "$pin+cpu" && return
    say "the package index has no CPU build; trying $TORCH_CPU_INDEX"
    pip_install --no-deps --retries 0 --timeout 10 --index-url "$TORCH_CPU_INDEX" "$pin" && return
    say "not reachable; installing plain $pin, which on Linux brings several GB of CUDA libraries"
    pip_install --no-deps "$pin" || fail_with_log torch
}

# With the interpreter's own packages in use, pins of ours give way to what is already there; torch stays as it is.
constraints_around_system_site() {
    "$VENV/bin/python" - "$CONSTRAINTS" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1], encoding="utf-8"):
    name = re.split(r"[=<>\s#]", line, maxsplit=1)[0]
    try:
        present = version(name) if name else ""
    except PackageNotFoundError:
        present = ""
    if not present:
        print(line, end="")
    elif name == "torch":
        print(f"torch=={present}")
PY
}

install() {
    local extras=$1 constraints=$CONSTRAINTS
    : >"$LOG"
    if [[ ${MEGAMOE_SYSTEM_SITE:-0} == 1 ]]; then
        "$VENV/bin/python" -c 'import torch' >>"$LOG" 2>&1 || die "MEGAMOE_SYSTEM_SITE=1, but $VENV sees no torch." \
            "import torch fails (details: $LOG)" "an interpreter with torch 2.11 to 2.13" \
            "rm -r $VENV and set PYTHON to the interpreter that has torch, or unset MEGAMOE_SYSTEM_SITE"
        constraints=$VENV/constraints.txt
        constraints_around_system_site >"$constraints"
        say "keeping torch $("$VENV/bin/python" -c 'import torch; print(torch.__version__)')"
    else
        install_torch "$(grep -m1 '^torch==' "$CONSTRAINTS")"
    fi
    say "installing megamoe${extras:+[$extras]} and what it needs"
    pip_install -c "$constraints" -e ".${extras:+[$extras]}" || fail_with_log megamoe
}

# Optional: whatever is in the way, megamoe works without them, and this script goes on.
install_kernels() {
    local cuda=0
    wants_cuda && cuda=1
    # Those of an earlier run are of other sources, and would stay where building fails.
    "$VENV/bin/python" -m pip uninstall -y megamoe-kernels >>"$LOG" 2>&1 || true
    if [[ ${MEGAMOE_KERNELS_REQUIRE:-0} != 1 ]] && ! compiler --version >/dev/null 2>&1; then
        say "no compiled ops, because no C++ compiler was found; everything works without them"
    elif MEGAMOE_KERNELS_CUDA=$cuda pip_install --no-deps ./kernels; then
        say "compiled ops: $("$VENV/bin/python" -c 'import megamoe_kernels as k; print(*k.what()["built"])')"
    elif [[ ${MEGAMOE_KERNELS_REQUIRE:-0} == 1 ]]; then
        fail_with_log megamoe-kernels
    else
        say "no compiled ops, because building them failed (see $LOG); everything works without them"
    fi
}

main() {
    if [[ -e $SEALED ]]; then
        say "using what the image holds"
        return
    fi
    # Pins of NVIDIA's images contradict ours; what they are there for, constraints_around_system_site keeps as well.
    [[ ${MEGAMOE_SYSTEM_SITE:-0} == 1 ]] && unset PIP_CONSTRAINT
    make_venv
    local done_fingerprint="" done_extras="" done_kernels="" wanted missing=""
    [[ -f $STAMP ]] && { read -r done_fingerprint && read -r done_extras && read -r done_kernels; } <"$STAMP" || true
    # Extras add up, so that quickstart and tests/run.sh do not undo each other.
    wanted=$({ printf '%s\n' "$@" && tr , '\n' <<<"$done_extras"; } | sort -u | sed '/^$/d' | paste -sd, -)
    [[ $wanted == "$done_extras" ]] || missing=yes
    if [[ $done_fingerprint != "$(fingerprint)" || -n $missing ]]; then
        rm -f "$STAMP"
        install "$wanted"
    elif [[ $done_kernels == "$(kernels_fingerprint)" ]]; then
        return
    fi
    printf '%s\n' "$(fingerprint)" "$wanted" >"$STAMP"
    install_kernels
    kernels_fingerprint >>"$STAMP"
    say "ready in ${SECONDS} s"
}

# pip answers Ctrl-C with an ordinary exit code; without this the script would go on to its next attempt.
trap 'exit 130' INT TERM
main "$@"
