#!/usr/bin/env bash
# Builds the image megamoe:VERSION with docker, podman or buildah, whichever is there.
#
#   bash docker/build.sh [option of the engine's build ...]
#   BASE=debian:bookworm-slim bash docker/build.sh                  for CPUs only
#   bash docker/build.sh --build-arg CUDA_ARCHS="90 100"            for other GPUs; all arguments: docker/Dockerfile
#
#   BASE=nvcr.io/nvidia/pytorch:YY.MM-py3    an image with torch 2.11 to 2.13, or plain Debian (default: the Dockerfile's)
#   TAG=megamoe:mine                         name of the result
#   ENGINE=buildah                           which engine
#
# The pip configuration of this machine (mirror, certificate, folders of wheels) is lent to the build and is not in the
# image. Folders on this machine can be lent by podman and buildah only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# die WHAT GOT EXPECTED TODO: the four parts that all errors here have.
die() {
    printf '%s\n  got: %s\n  expected: %s\n  to do: %s\n' "$@" >&2
    exit 2
}

find_engine() {
    local engine
    for engine in ${ENGINE:-docker podman buildah}; do
        if command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
            echo "$engine"
            return
        fi
    done
    die "No engine that builds images answers." "none of: ${ENGINE:-docker podman buildah}" \
        "one of them installed, and running where it is a service" "install one (Debian: apt install buildah)"
}

# lend_pip FOLDER: writes what pip is told on this machine, by files and variables, to FOLDER/pip.conf, and prints the
# options of the build that lend it. Nothing where pip is not installed or told nothing.
lend_pip() {
    python3 - "$1" <<'PY'
import ast
import pathlib
import subprocess
import sys

NAMES = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert", "timeout", "default-timeout")
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
settings = {}
for line in listed.splitlines():
    key, _, value = line.partition("=")
    name = key.split(".")[-1]
    if name in NAMES:
        settings.setdefault(name, ast.literal_eval(value))  # variables are listed first, and win
if settings:
    if certificate := settings.get("cert"):
        settings["cert"] = "/run/secrets/ca"
        print(f"--secret=id=ca,src={certificate}")
    file = pathlib.Path(sys.argv[1], "pip.conf")
    lines = [f"{name} = " + "\n    ".join(value.split()) for name, value in settings.items()]
    file.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    print(f"--secret=id=pip.conf,src={file}")
    for name in NAMES[:3]:
        for place in settings.get(name, "").split():
            folder = pathlib.Path(place.removeprefix("file://"))
            # The pages of an index point to files beside its folder.
            folder = folder if name == "find-links" else folder.parent
            if folder.is_absolute() and folder.is_dir() and folder != folder.parent:
                print(f"--volume={folder}:{folder}:ro")
PY
}

main() {
    local engine version options lent folders secrets
    engine=$(find_engine)
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' megamoe/__init__.py)
    options=(--file docker/Dockerfile --tag "${TAG:-megamoe:$version}" --label "org.opencontainers.image.version=$version")
    options+=(--label "org.opencontainers.image.revision=$(git describe --always --dirty 2>/dev/null || echo unknown)")
    [[ -n ${BASE:-} ]] && options+=(--build-arg "BASE=$BASE")
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    mapfile -t lent < <(lend_pip "$temporary" || true)
    mapfile -t folders < <(printf '%s\n' "${lent[@]}" | grep ^--volume= || true)
    mapfile -t secrets < <(printf '%s\n' "${lent[@]}" | grep ^--secret= || true)
    if [[ $engine == docker ]]; then
        ((${#folders[@]} == 0)) || die "docker cannot lend folders to a build." "${folders[*]}" \
            "a pip configuration whose packages come by network" "ENGINE=podman or ENGINE=buildah"
        export DOCKER_BUILDKIT=1
    else
        options+=(--format docker --layers)
    fi
    if ((${#folders[@]})); then
        # A folder that is mounted while a layer is made leaves an empty one in it. So the stage that installs is built
        # by itself, on the finished one below it; nothing but its .venv is kept.
        "$engine" build "${options[@]}" "$@" --target base .
        "$engine" build "${options[@]}" "${secrets[@]}" "${folders[@]}" "$@" --target build .
    fi
    "$engine" build "${options[@]}" "${secrets[@]}" "$@" .
}

main "$@"
