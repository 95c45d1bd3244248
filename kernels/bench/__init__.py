"""What the GPU suite measures: ceilings, ops, the MoE layer, peers, training. One module each; results are JSON.

Run from the repository's root, with the root and `kernels/` on PYTHONPATH: `python -m kernels.bench.ops --smoke`.
`kernels/gpu_suite.sh` runs all of them; `kernels/results/README.md` says what they write.
"""
