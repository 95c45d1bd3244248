"""The base of every config section: frozen, strict about types, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of a run's configuration.

    Frozen because a run has one configuration from start to end and stores it; strict because a `"64"` where
    a number belongs is a typing error worth knowing; no unknown keys because a misspelt key must not be
    ignored; no infinities or NaN because bounds do not catch them and JSON cannot store them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
