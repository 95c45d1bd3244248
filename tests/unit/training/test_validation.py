"""What validation counts: nats, labels, and conversations all of whose answers are right."""

import torch

from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.model.decoder import ModelOutput, Scores
from megamoe.training.validation import score_batch


def test_a_conversation_is_right_when_all_its_labels_are() -> None:
    documents_BS = torch.tensor([[0, 0, 0, 1, 1, 2, PADDING], [0, 0, 0, 0, 0, 0, 0]])
    counted_BS = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1]]).bool()
    right_BS = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1]]).bool()
    labels_BS = torch.where(counted_BS, 5, IGNORED)
    losses_BS = counted_BS * torch.arange(14.0).view(2, 7)
    batch = Batch(torch.zeros_like(labels_BS), labels_BS, documents_BS, 1.0)
    zero = torch.zeros(())
    total = score_batch(batch, ModelOutput(zero, zero, (), Scores(losses_BS, right_BS, counted_BS)))
    # Row 0: the first is right, the second has one wrong, the third has no label. Row 1: one, and right.
    assert total.tolist() == [float(losses_BS.sum()), 8.0, 2.0, 3.0]


def test_nothing_to_count() -> None:
    nothing_BS = torch.zeros(2, 4, dtype=torch.bool)
    batch = Batch(*(torch.full((2, 4), value) for value in (0, IGNORED, PADDING)), 1.0)
    zero = torch.zeros(())
    output = ModelOutput(zero, zero, (), Scores(torch.zeros(2, 4), nothing_BS, nothing_BS))
    assert score_batch(batch, output).tolist() == [0.0, 0.0, 0.0, 0.0]
