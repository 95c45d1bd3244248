"""What a cluster can do, as rates and latencies: the file that `python -m megamoe plan --cluster` reads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict

from megamoe.config.base import Section
from megamoe.config.problems import Problem
from megamoe.config.section_file import read_section
from megamoe.config.sources import Source

Precision = Literal["bf16", "fp32", "fp64"]
Pass = Literal["forward", "inputs", "weights"]


class ProductRate(Section):
    """How fast matrix products with so many rows run."""

    rows: int = Field(ge=1, description="Rows of the product: tokens, or rows of one expert.")
    flops_per_second: float = Field(gt=0, description="Of one rank while the others of its node work as well.")


Curve = Annotated[tuple[ProductRate, ...], Strict(False), Field(min_length=1)]
"""Rates by rows, ascending; between two of them by interpolation, beyond them as at the end."""


class ExpertRates(Section):
    """Measured passes of experts, with what lies between their products."""

    forward: Curve = Field(description="Three products for every expert.")
    inputs: Curve = Field(description="Gradients of the rows: three products for every expert.")
    weights: Curve = Field(description="Gradients of the weights: three products for every expert.")


class LinkRates(Section):
    """Exchanges between ranks over one class of links."""

    latency_seconds: float = Field(ge=0, description="Of one exchange, however small.")
    bytes_per_second: float = Field(gt=0, description="That one rank sends to others while all do.")
    computation_kept: float = Field(
        1.0, gt=0, le=1, description="Share of its speed that computation keeps while an exchange is under way."
    )
    exchange_kept: float = Field(
        1.0, gt=0, le=1, description="Share of its speed that an exchange keeps while there is computation."
    )


class LaunchRates(Section):
    """What the host does for every operation."""

    seconds: float = Field(ge=0, description="Of the host per operation that it issues.")
    ahead: bool = Field(
        True, description="Whether the host issues operations and goes on (GPU), or does them itself (CPU)."
    )


class HardwareConfig(Section):
    """A cluster. Whoever writes one says where its figures come from."""

    name: str = Field(min_length=1)
    sources: Annotated[tuple[str, ...], Strict(False)] = Field(
        min_length=1, description="Where the figures come from: data sheets, measurements with their conditions."
    )
    ranks_per_node: int = Field(ge=1, description="Devices, and so ranks, of one node.")
    products: dict[Precision, Curve] = Field(min_length=1, description="Matrix products, by precision.")
    experts: dict[Precision, ExpertRates] = Field(
        default_factory=dict,
        description="Passes of experts, where they were measured; else they follow from products and memory.",
    )
    memory_bytes_per_second: float = Field(gt=0, description="Read and written by operations that only move values.")
    rows_bytes_per_second: float | None = Field(
        None, gt=0, description="Read and written where rows are put into another order; null: as memory."
    )
    launch: LaunchRates
    inside: LinkRates = Field(description="Between the ranks of a node.")
    between: LinkRates | None = Field(None, description="Between nodes, of one rank; null: there is one node.")


def load_hardware(path: str | Path) -> HardwareConfig:
    """Read a cluster's file.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    todo = f"correct {path}; configs/hardware has examples"
    return read_section(path, HardwareConfig, _out_of_order, what="The cluster's file", todo=todo)


def _out_of_order(hardware: HardwareConfig, source: Source) -> list[Problem]:
    curves = {("products", precision): curve for precision, curve in hardware.products.items()}
    for precision, rates in hardware.experts.items():
        for name in ExpertRates.model_fields:
            curves["experts", precision, name] = getattr(rates, name)  # type: ignore[index]
    return [
        Problem(".".join(keys), "the rows of a curve ascend", source=source.place(keys))
        for keys, curve in curves.items()
        if any(a.rows >= b.rows for a, b in pairwise(curve))
    ]
