"""Op `row_softmax`: softmax over the experts of each token."""

from __future__ import annotations

from torch import Tensor

NARROW = 16


def row_softmax(logits_TE: Tensor) -> Tensor:
    """softmax(logits) along the last dimension, [T, E], in the dtype of the logits.

    For few experts on a CPU as exp(x - logsumexp(x)): torch's softmax works row by row there, and rows of 8 leave most
    of a vector register empty (0.3 ms against 1.0 for 4096 rows, forward and backward, one thread).
    """
    if logits_TE.shape[-1] >= NARROW or logits_TE.device.type != "cpu":
        return logits_TE.softmax(-1)
    # The largest becomes 0 first, so that the logarithm, which lies between 0 and ln E, keeps all its digits.
    shifted_TE = logits_TE - logits_TE.detach().amax(-1, keepdim=True)
    return (shifted_TE - shifted_TE.logsumexp(-1, keepdim=True)).exp()
