"""Section `data`: which text a run reads, how it is tokenized, and where the prepared files lie."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict, field_validator

from megamoe.config.base import Section


class SourceConfig(Section):
    """One corpus and its share of the training samples."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="Name of the source; also the name of its folder below `data.prepared_dir`.",
    )
    path: str = Field(
        min_length=1,
        description="`stdlib` (the Python files of the interpreter's standard library), a folder, or a file. "
        "Files ending in .jsonl hold one JSON object per line; every other file is one UTF-8 document.",
    )
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Share of the samples, relative to the other sources."
    )
    text_key: str = Field("text", min_length=1, description="JSONL only: the key that holds the text.")


class TokenizerConfig(Section):
    """The sentencepiece tokenizer: an existing one, or one trained on the sources."""

    path: str | None = Field(
        None,
        description="An existing sentencepiece model; null: train a BPE model while preparing.",
    )
    vocab_size: int = Field(
        4096,
        ge=300,
        le=1_000_000,
        description="Number of token ids; an existing model must agree.",
    )
    sample_lines: int = Field(100_000, ge=1, description="Lines drawn to train it on, less those held out.")


class DataConfig(Section):
    """Sources, tokenizer, and the folder that `python -m megamoe data prepare` fills."""

    sources: Annotated[tuple[SourceConfig, ...], Strict(False)] = Field(
        (SourceConfig(name="stdlib", path="stdlib"),),
        min_length=1,
        description="Corpora, blended by weight.",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="The tokenizer.")
    prepared_dir: str = Field("data/stdlib", min_length=1, description="Folder of the prepared files.")
    seq_length: int = Field(256, ge=1, description="Tokens that the model reads per sample.")
    validation_fraction: float = Field(
        0.02, gt=0, lt=1, description="Share of each source's documents that is held out from training."
    )
    num_workers: int = Field(0, ge=0, description="Threads that tokenize while preparing; 0 for all cores.")

    @field_validator("sources")
    @classmethod
    def _names_are_unique(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; more than once: {', '.join(twice)}")
        return sources
