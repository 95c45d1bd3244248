#!/usr/bin/env bash
# The tiny recipe with both routers, on two ranks (EP 2) and on one, each for its default number of steps; then a table
# and a plot of the four runs; then on one rank, two and four with training.rank_invariant, compared bit by bit; then one
# rank and two in fp64, to see how long they stay equal. About 6, 14 and 9 minutes on 2 cores, after
# `bash launch/quickstart.sh` has prepared the data.
#
#   bash configs/reproduce/tiny/run.sh [folder for the runs, default runs/reproduce_tiny]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
runs=${1:-runs/reproduce_tiny}
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"

python -m megamoe data prepare --config configs/tiny.yaml
for router in topk resonance; do
    for ranks in 2 1; do
        OMP_NUM_THREADS=$((2 / ranks)) deepspeed --num_accelerators "$ranks" launch/pretrain.py \
            --config configs/tiny.yaml "configs/moe/$router.yaml" \
            "parallel.ep=$ranks" "training.output_dir=$runs/${router}_$ranks" training.checkpoint.every=0
    done
done
python configs/reproduce/tiny/summarise.py "$runs" configs/reproduce/tiny
for router in topk resonance; do
    for ranks in 4 2 1; do
        OMP_NUM_THREADS=1 deepspeed --num_accelerators "$ranks" launch/pretrain.py \
            --config configs/tiny.yaml "configs/moe/$router.yaml" configs/parallel/rank_invariant.yaml \
            "parallel.ep=$ranks" "training.output_dir=$runs/invariant_${router}_$ranks" training.checkpoint.every=0
    done
done
python configs/reproduce/tiny/invariance.py "$runs" configs/reproduce/tiny
python configs/reproduce/tiny/layouts.py configs/reproduce/tiny
