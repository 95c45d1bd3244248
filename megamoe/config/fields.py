"""The names that a configuration knows, read off the pydantic models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from megamoe.config.run import RunConfig


@dataclass(frozen=True)
class KnownField:
    """One field of the configuration.

    Attributes:
        path: dotted name; the elements of a list are written `*`.
        is_section: it holds further fields.
        owner: where a section has variants chosen by a discriminator, that which has this field; else empty.
        discriminator: the name of that discriminator, on the section itself; else empty.
        default: for a section with variants, the variant it has when nothing is said; else empty.
    """

    path: str
    is_section: bool = False
    owner: str = ""
    discriminator: str = ""
    default: str = ""


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation, whatever unions, lists and Annotated are around them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _sections(argument)]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) or any(map(_is_list, get_args(annotation)))


def _walk(model: type[BaseModel], prefix: str, owner: str = "") -> Iterator[KnownField]:
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        sections = _sections(info.annotation)
        discriminator = info.discriminator if isinstance(info.discriminator, str) else ""
        value = info.get_default(call_default_factory=True) if discriminator else None
        default = getattr(value, discriminator) if discriminator else ""
        yield KnownField(path, bool(sections), owner, discriminator, default)
        inner = f"{path}.*" if _is_list(info.annotation) else path
        for section in sections:
            variant = section.model_fields[discriminator].default if discriminator else ""
            yield from _walk(section, inner, variant)


@cache
def known_fields() -> tuple[KnownField, ...]:
    """Every field of a run's configuration, sections included, variants one after the other."""
    return tuple(_walk(RunConfig, ""))


@cache
def variant_sections() -> dict[str, tuple[str, str]]:
    """Sections chosen by a discriminator: dotted path to (name of the discriminator, default variant)."""
    return {f.path: (f.discriminator, f.default) for f in known_fields() if f.discriminator}


def siblings(path: str) -> list[str]:
    """Names of the fields in the section that holds `path`, in any variant."""
    parent = path.rpartition(".")[0]
    return sorted({f.path.rpartition(".")[2] for f in known_fields() if f.path.rpartition(".")[0] == parent})
