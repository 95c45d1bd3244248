"""A small model whose weights are large enough that its routing matters, and one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megamoe.data.batch import IGNORED, PADDING, Batch
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.testing.configs import tiny_config
from megamoe.training.setup import Runtime


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(0, 1, torch.device("cpu"), groups=None)  # type: ignore[arg-type]  # no measure looks at groups


@pytest.fixture
def build() -> Callable[..., Decoder]:
    """Two blocks with 8 experts each, of which a token takes 2, in evaluation mode and with frozen parameters."""

    def build(*overrides: str) -> Decoder:
        config = tiny_config("model.init_std=0.4", *overrides)
        model = Decoder(config, 320)
        initialise(model, config.model, seed=5)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture
def batches() -> list[Batch]:
    """Three batches of 3 rows of 10 tokens; the last row ends after 6, and its first 3 labels do not count."""

    def batch(seed: int) -> Batch:
        text = torch.randint(320, (3, 11), generator=torch.Generator().manual_seed(seed))
        labels_BS, documents_BS = text[:, 1:].clone(), torch.zeros(3, 10, dtype=torch.int64)
        documents_BS[2, 6:] = PADDING
        labels_BS[2, 6:] = labels_BS[2, :3] = IGNORED
        return Batch(text[:, :-1].contiguous(), labels_BS, documents_BS, 17.0)

    return [batch(seed) for seed in range(3)]
