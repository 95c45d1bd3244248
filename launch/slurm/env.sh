# Settings of the communication libraries, sourced by the job scripts and by launch/preflight.sh. What is set already stays.
# Uncomment what your network needs, then measure: bash launch/preflight.sh (see there).
# shellcheck shell=bash

# Says which rank failed and why, and nothing while all is well. INFO shows the chosen interfaces and rings, for a first run.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# A collective that fails or passes its limit (training.timeout_minutes) ends the process instead of leaving it waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Keeps the last collectives of every rank; on a timeout they are written, so that one sees who was missing from which.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Tokens per expert change from step to step, and so do the sizes of buffers: without this, freed memory fragments.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# The interface by which ranks find each other and gloo sends, where there are several. Needed where a host's own name
# leads to 127.0.1.1 (Debian's habit), which no other host reaches.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=eth0          # several: eth0,eth1; all but some: ^docker0,lo

# InfiniBand and RoCE: which adapters carry the exchange of tokens. Leave out the ones for storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# export NCCL_IB_GID_INDEX=3              # RoCE v2, where show_gids says so
# export NCCL_IB_TIMEOUT=22               # for fabrics that reroute under load (about 4 us x 2^22 per try)
# export NCCL_IB_DISABLE=1                # to see whether a fault is the fabric's: everything over sockets

# AWS EFA, GPUDirect and others bring variables of their own with their images; they belong here as well.
