"""Named random streams: every use of randomness has a name, and its seed is a pure function of run seed and name."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *name: str | int) -> int:
    """Seed of the stream called `name`, in [0, 2**63).

    Streams of different names are independent, and none depends on how much another one was used. So a weight's
    initial value does not depend on how many ranks there are, nor a sample's place on what was drawn before it.
    """
    text = "/".join([str(seed), *(str(part) for part in name)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
