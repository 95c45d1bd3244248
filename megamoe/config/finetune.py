"""Section `finetune`: what supervised fine-tuning starts from, and which conversations it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator

from megamoe.config.base import Section


class ConversationSource(Section):
    """One file or folder of conversations."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="Name of the source; results are given for each source."
    )
    path: str = Field(
        min_length=1,
        description="A .jsonl file, or a folder of them. Each line is an object with `messages` (a list of {role, "
        "content}), with `prompt` and `completion`, or with `text` (no prompt: all of it is learnt).",
    )
    validation: str | None = Field(
        None, min_length=1, description="A .jsonl file or folder held out for validation; null: a share of `path`."
    )
    repeat: int = Field(1, ge=1, description="How often each conversation occurs in an epoch.")


class TurnConfig(Section):
    """The text around what one role says."""

    prefix: str = Field("", description="Written before the content.")
    suffix: str = Field("", description="Written after the content; learnt where the content is.")


class SystemTurnConfig(TurnConfig):
    """Around instructions."""

    suffix: str = Field("\n\n", description="Written after the content.")


class UserTurnConfig(TurnConfig):
    """Around questions, and prompts."""

    prefix: str = Field("User: ", description="Written before the content.")
    suffix: str = Field("\n", description="Written after the content.")


class AssistantTurnConfig(TurnConfig):
    """Around answers, and completions."""

    prefix: str = Field("Assistant: ", description="Written before the content, and not learnt.")
    suffix: str = Field("\n", description="Written after the content, and learnt with it.")


class TemplateConfig(Section):
    """How a conversation becomes text.

    Prefix, content and suffix are tokenized one by one, so that the tokens before an answer are the same in training
    and in generation; the last answer is followed by the end-of-document token.
    """

    system: SystemTurnConfig = Field(default_factory=SystemTurnConfig, description="Instructions.")
    user: UserTurnConfig = Field(default_factory=UserTurnConfig, description="Questions; prompts as well.")
    assistant: AssistantTurnConfig = Field(
        default_factory=AssistantTurnConfig, description="Answers; completions as well."
    )


class FinetuneConfig(Section):
    """Supervised fine-tuning of a trained model."""

    checkpoint: str = Field(
        min_length=1,
        description="Run folder or checkpoint to start from; architecture, tokenizer and router come from it.",
    )
    sources: Annotated[tuple[ConversationSource, ...], Strict(False)] = Field(
        min_length=1, description="Conversations to learn."
    )
    template: TemplateConfig = Field(default_factory=TemplateConfig, description="Text around what each role says.")
    epochs: int | None = Field(
        None,
        ge=1,
        description="Passes over all conversations; training.steps then follows from the data and is not given. null: "
        "training.steps decides.",
    )
    packing: bool = Field(
        True, description="Put several conversations into one sequence; they do not see each other. false: one each."
    )
    loss_on: Literal["answers", "all"] = Field("answers", description="Which tokens are learnt.")
    validation_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of a source's conversations that is held out where it names no validation."
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="A conversation of more than data.seq_length tokens: refuse to start, leave it out, or cut its end "
        "off; what was left out or cut is counted and listed.",
    )
    bad_lines: Literal["error", "skip"] = Field(
        "error", description="Lines that are no conversation: refuse to start, or leave them out, counted and listed."
    )

    @field_validator("sources")
    @classmethod
    def _names_are_unique(cls, sources: tuple[ConversationSource, ...]) -> tuple[ConversationSource, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source names must differ; more than once: {', '.join(twice)}")
        return sources
