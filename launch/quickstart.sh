#!/usr/bin/env bash
# From a fresh clone to a trained model that writes: set up, prepare data, train on 2 processes, measure, sample.
# Needs no GPU. Run it again to continue the training in runs/tiny.
#
#   bash launch/quickstart.sh [dotted.path=value ...]     for example training.steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CONFIG=configs/tiny.yaml RUN=runs/tiny RANKS=2
readonly PROMPT='def '

stage() { printf '\n== %s/5 %s\n' "$1" "$2"; }

stage 1 "set up (.venv)"
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
# The ranks share the cores.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"

stage 2 "prepare data (this Python's standard library as text)"
python -m megamoe data prepare --config "$CONFIG" "$@"

stage 3 "train on $RANKS processes ($RUN)"
deepspeed --num_accelerators "$RANKS" launch/pretrain.py --config "$CONFIG" "$@"

stage 4 "evaluate on documents held out from training"
python launch/evaluate.py --checkpoint "$RUN"

stage 5 "write"
python launch/generate.py --checkpoint "$RUN" --prompt "$PROMPT"
