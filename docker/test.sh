#!/usr/bin/env bash
# Proves the image without a container engine's service and without any image from elsewhere: a Debian made by
# debootstrap, built upon by buildah, trained in as the image's own user, as a stranger and as root.
#
#   bash docker/test.sh                                   the whole recipe; docker/results.md is of such a run
#   bash docker/test.sh training.steps=12 ...             a shorter one
#   STORAGE=DIR bash docker/test.sh                       keep images there, and take what is there (default: nothing stays)
#   REPORT=docker/results.md bash docker/test.sh          write the result there as well
#
# Linux, root, and the packages buildah and debootstrap; about 10 GB of disk meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BASE=localhost/debian:bookworm IMAGE=localhost/megamoe:test CONFIG=configs/tiny.yaml
readonly STRANGER=12345 # a user of whom no file of the image knows
temporary=$(mktemp -d)
storage=$(realpath -m "${STORAGE:-$temporary/storage}")
container="" running="" rows=()

export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$temporary/storage.conf TMPDIR=$storage/temporary
mkdir -p "$TMPDIR"

# die WHAT GOT EXPECTED TODO: the four parts that all errors here have.
die() {
    printf '%s\n  got: %s\n  expected: %s\n  to do: %s\n' "$@" >&2
    exit 2
}

clean_up() {
    local code=$?
    [[ -z $running || $code == 0 ]] || printf '\nThe image failed its test, while it had to: %s (exit code %s)\n' "$running" "$code" >&2
    [[ -z $container ]] || buildah rm "$container" >/dev/null || true
    [[ -n ${STORAGE:-} ]] || buildah rmi --all --force >/dev/null 2>&1 || true
    rm -rf "$temporary"
}
trap clean_up EXIT

# step NAME COMMAND...: runs it, and notes how long it took. Where it fails the script ends.
step() {
    local begin=$SECONDS
    running=$1
    printf '\n== %s\n' "$running"
    "${@:2}" </dev/null
    rows+=("| $running | $((SECONDS - begin)) s |")
    running=""
}

# inside USER COMMAND...: in the container. Without a host name of its own it gets an id that nothing resolves.
inside() {
    local user=$1
    shift
    buildah run --hostname localhost --user "$user" --env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" "$container" -- "$@"
}

make_base() {
    if buildah inspect --type image "$BASE" >/dev/null 2>&1; then
        return
    fi
    debootstrap --variant=minbase bookworm "$temporary/root" >"$temporary/debootstrap.log" 2>&1 || {
        tail "$temporary/debootstrap.log" >&2
        return 1
    }
    local made
    made=$(buildah from scratch)
    buildah add --quiet "$made" "$temporary/root" /
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd /bin/bash "$made"
    buildah commit --quiet --rm --format docker "$made" "$BASE"
    rm -rf "$temporary/root"
}

build() { env ENGINE=buildah BASE="$BASE" TAG="$IMAGE" bash docker/build.sh --pull-never; }

owner() { buildah inspect --type image --format '{{.Docker.Config.User}}' "$IMAGE"; }

# Who may write where: neither of those who are not root to the code, both to the folders of runs.
is_closed() {
    local user
    for user in "$(owner)" "$STRANGER"; do
        # shellcheck disable=SC2016
        inside "$user" bash -ec 'for place in . launch megamoe configs .venv; do [[ ! -w $place ]]; done
            touch data/x runs/x ~/x; rm data/x runs/x ~/x'
    done
}

# What only belongs to the machine that builds: folders that were mounted, the configuration of pip, the checkout.
is_clean() {
    local folder name names
    names=$(python3 -m pip config list 2>/dev/null | grep -E '(index-url|find-links)=' | grep -oE "(file://)?/[^ ']+" || true)
    folder=$(buildah mount "$container")
    for name in etc/pip.conf run/secrets megamoe/tests megamoe/.git megamoe/kernels/build $names; do
        [[ ! -e $folder/${name#file://} ]] || die "The image holds what it should not." "$name" "nothing there" \
            "see .dockerignore, and what docker/build.sh says of mounted folders"
    done
    if [[ -n $names ]] && grep -rIlF "$names" "$folder/megamoe" "$folder/var" "$folder/etc"; then
        die "The image names folders of this machine." "the files above" "none" "remove them in docker/Dockerfile"
    fi
    if buildah inspect --type image "$IMAGE" | grep -iE 'PIP_|secrets/'; then
        die "The image tells of the build's configuration." "the lines above" "none" "remove them from docker/Dockerfile"
    fi
}

train() { inside "$(owner)" deepspeed --num_accelerators 2 launch/pretrain.py --config "$CONFIG" "$@"; }

# The numbers of the run, of which the loss must have fallen.
numbers() {
    inside "$(owner)" python -c '
import json
lines = [json.loads(line) for line in open("runs/tiny/metrics.jsonl")]
losses = [line["cross_entropy"] for line in lines if "cross_entropy" in line]
rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
step, rate = lines[-1]["step"], rates[len(rates) // 2]
print(f"{step} steps, cross entropy {losses[0]:.3f} to {losses[-1]:.3f}, {rate:,.0f} tokens/s")
assert losses[-1] < losses[0], losses'
}

report() {
    local version size cores
    version=$(inside 0 python -c 'import torch, deepspeed, platform
print(f"Python {platform.python_version()}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}")' 2>/dev/null | tail -n 1)
    size=$(buildah images --format '{{.Size}}' "$IMAGE")
    cores=$(getconf _NPROCESSORS_ONLN)
    printf '# The image, tested\n\n'
    # shellcheck disable=SC2016
    printf 'Written by `REPORT=docker/results.md bash docker/test.sh`, %s, %s, %s CPU cores.\n\n' "$(date +%F)" \
        "$(buildah --version | sed 's/ (.*//')" "$cores"
    printf '%s. Image %s, of which base %s.\n\n' "$version" "$size" "$(buildah images --format '{{.Size}}' "$BASE")"
    printf 'Training inside: %s.\n\n' "$1"
    printf '| step | time |\n|---|---|\n'
    printf '%s\n' "${rows[@]}"
}

main() {
    local tool
    for tool in buildah debootstrap; do
        command -v "$tool" >/dev/null || die "$tool is missing." "not on the PATH" "buildah and debootstrap" \
            "apt install buildah debootstrap"
    done
    ((EUID == 0)) || die "debootstrap makes device files." "user $(id -un)" "root" "run it as root, on a machine for tests"
    printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' "${STORAGE_DRIVER:-overlay}" "$storage/images" \
        "$storage/run" >"$CONTAINERS_STORAGE_CONF"
    step "be given its base (debootstrap, Debian 12)" make_base
    step "build; doctor is the last step" build
    container=$(buildah from --pull-never "$IMAGE")
    step "let users other than root write to data/ and runs/, and not to the code" is_closed
    step "hold nothing of this machine" is_clean
    step "prepare data" inside "$(owner)" python -m megamoe data prepare --config "$CONFIG"
    step "train on 2 processes" train "$@"
    local trained
    trained=$(numbers)
    printf '%s\n' "$trained"
    step "evaluate as a user without a name" inside "$STRANGER" python launch/evaluate.py --checkpoint runs/tiny
    step "write as root" inside 0 python launch/generate.py --checkpoint runs/tiny --prompt "def "
    step "run the quickstart: nothing to set up, and the training is complete" inside "$(owner)" bash launch/quickstart.sh "$@"
    step "run the doctor" inside "$(owner)" python -m megamoe doctor
    printf '\n'
    report "$trained" | tee "$temporary/report.md"
    [[ -z ${REPORT:-} ]] || cp "$temporary/report.md" "$REPORT"
}

main "$@"
