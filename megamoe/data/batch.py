"""What a loader hands to the model for one micro-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -1
"""Label of a position that does not count."""
PADDING = -1
"""Document number of a position that holds no token."""


class Batch(NamedTuple):
    """B sequences of S tokens. NamedTuple, because DeepSpeed's ZeRO-3 finds tensors inside of it."""

    tokens_BS: Tensor
    """int64."""
    labels_BS: Tensor
    """int64: the next token, or IGNORED."""
    documents_BS: Tensor | None = None
    """int64: number of the document inside its sequence, from 0 on, in consecutive runs; PADDING where there is none.
    Documents do not see each other. None: each sequence is one document, its parts before and after included."""
    targets: float | None = None
    """What the sum of the losses is divided by, such that the mean over micro-batches and ranks is the mean over all
    labels that count in the global batch: their number / (micro-steps * data-parallel ranks). None: all labels of this
    batch, of which every micro-batch has equally many."""

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        documents = self.documents_BS.to(device) if self.documents_BS is not None else None
        return Batch(self.tokens_BS.to(device), self.labels_BS.to(device), documents, self.targets)
