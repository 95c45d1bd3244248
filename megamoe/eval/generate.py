"""Text from a model: temperature, nucleus sampling, key/value cache. Experts by token choice only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.common.determinism import stream_seed
from megamoe.common.errors import ConfigError
from megamoe.config.run import RunConfig
from megamoe.data.conversations import Turn
from megamoe.data.template import ChatTemplate
from megamoe.data.tokenizer import Tokenizer
from megamoe.eval.loading import any_rank
from megamoe.model.decoder import Decoder
from megamoe.parallel import collectives
from megamoe.training.setup import Runtime


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens whose probabilities sum to this."""
    samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0


Encode = Callable[[str], list[int]]


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    runtime: Runtime,
    encode: Encode | None = None,
) -> list[list[str]]:
    """Continuations of each prompt, in order, on every rank. Collective; prompts are shared among the ranks.

    A prompt's continuations depend on the seed and its place in the list, not on the number of ranks.

    Args:
        encode: the tokens of a prompt; None: the end-of-document token, then those of its text.
    """
    encode = encode or (lambda text: [tokenizer.eod_id, *tokenizer.encode(text)])
    mine: dict[int, list[str]] = {}
    for start in range(0, len(prompts), runtime.world_size):
        index = start + runtime.rank
        # Every rank generates in every round, because the experts' exchange needs all of them.
        prompt = prompts[index] if index < len(prompts) else ""
        rows = _continue(model, tokenizer, encode(prompt), sampling, index, runtime, idle=index >= len(prompts))
        if index < len(prompts):
            mine[index] = rows
    everyone = {i: rows for part in collectives.gather_objects(mine) for i, rows in part.items()}
    return [everyone[i] for i in range(len(prompts))]


def chat_prompt(config: RunConfig, tokenizer: Tokenizer, system: str | None) -> Encode:
    """The tokens before the answer to a user's message, in the template that the model was fine-tuned with.

    Raises:
        ConfigError: the checkpoint is not one of fine-tuning.
    """
    if config.finetune is None:
        raise ConfigError(
            "This model knows no conversations.",
            got="--chat, and a checkpoint of pretraining",
            expected="a checkpoint of launch/finetune.py",
            todo="leave --chat out",
        )
    template = ChatTemplate(config.finetune.template, tokenizer)
    before = [Turn("system", system, False)] if system is not None else []
    return lambda text: template.prompt_ids([*before, Turn("user", text, False)])


@torch.no_grad()
def _continue(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    index: int,
    runtime: Runtime,
    *,
    idle: bool,
) -> list[str]:
    generator = torch.Generator(runtime.device).manual_seed(stream_seed(sampling.seed, "generate", index))
    tokens = torch.tensor([prompt], device=runtime.device)
    tokens_BS = tokens.expand(sampling.samples, -1)
    caches, finished_B = model.new_caches(), torch.full((sampling.samples,), idle, device=runtime.device)
    written: list[Tensor] = []
    for _ in range(sampling.max_new_tokens):
        next_B = sample(model.logits(tokens_BS, caches)[:, : tokenizer.vocab_size], sampling, generator)
        next_B = torch.where(finished_B, tokenizer.eod_id, next_B)
        written.append(next_B)
        finished_B = finished_B | (next_B == tokenizer.eod_id)
        tokens_BS = next_B[:, None]
        if not any_rank(not bool(finished_B.all()), runtime.device):
            break
    return [_text(tokenizer, row) for row in torch.stack(written, dim=1).tolist()]


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id per row, int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV, ids_BV = (logits_BV / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A token stays while those before it do not yet sum to top_p; so the likeliest one always does.
    outside_BV = probs_BV.cumsum(-1) - probs_BV >= min(sampling.top_p, math.nextafter(1.0, 2.0))
    choice_B1 = torch.multinomial(probs_BV.masked_fill(outside_BV, 0.0), 1, generator=generator)
    return ids_BV.gather(1, choice_B1).squeeze(1)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    end = ids.index(tokenizer.eod_id) if tokenizer.eod_id in ids else len(ids)
    return tokenizer.decode(ids[:end])
