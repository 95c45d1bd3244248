"""JSON as its standard has it: other programs than Python's cannot read NaN and Infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(values: Any, indent: int | None = None) -> str:
    """As `json.dumps`, with null for what is not finite: a diverged loss, the gradient norm of a skipped step."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
