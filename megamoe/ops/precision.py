"""The precision in which sums and decisions are made."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp32 for half precisions; fp32 and fp64 as they are.

    A router in bf16 cannot tell two experts apart whose logits differ by less than 1 %; a model in fp64 (a proof, see
    `training.precision`) must not lose its digits on the way.
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()
