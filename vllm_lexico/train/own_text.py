"""Text that a model writes itself: what it may write, and how transformers has it written where vLLM does not."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

WRITTEN_TOKENS = 1024  # of a text; a model writes many short texts in the time of a few long ones


@torch.no_grad()
def sequences_from_model(
    model: Any, length: int, count: int, seed: int, batch: int, advance: Callable[[int], None] | None = None
) -> torch.Tensor:
    """Text that a model samples itself at temperature 1, each from a random first token. Needs no data, no tokenizer.

    The start token, where the model has one, comes before it. Tokens that stand for images or sound are never taken.

    Args:
        model: of transformers.
        length: tokens per sequence.
        count: of sequences.
        seed: of everything random.
        batch: sequences at once.
        advance: told of the tokens that were written since the last call.

    Returns:
        int64 [count, length] token ids, on the CPU.

    Raises:
        ValueError: what the model computes is no number.
    """
    torch.manual_seed(seed)
    start, others = model.config.get_text_config().bos_token_id, _tokens_of_other_inputs(model.config)
    words = torch.tensor(text_tokens(model.config), device=model.device)
    pieces = []

    def count_tokens(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if advance is not None:
            advance(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # nobody is to stop

    for at in range(0, count, batch):
        rows = min(batch, count - at)
        prompt = words[torch.randint(len(words), (rows, 1), device=model.device)]
        if start is not None:
            prompt = torch.cat((torch.full_like(prompt, start), prompt), 1)
        if not at and not model(prompt[:1]).logits.isfinite().all():  # where draws would fail, on a GPU without a word
            raise ValueError(
                "the model computes numbers that are not finite, so it writes no text and has no keys to learn from; "
                "fix its weights, or give another --dtype"
            )
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - prompt.shape[1],
            max_new_tokens=length - prompt.shape[1],
            stopping_criteria=[count_tokens],
            suppress_tokens=others or None,
        )
        pieces.append(sampled[:, :length].cpu())
    return torch.cat(pieces)


def join(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Texts, int [tokens] one after the other, cut into int64 [rows, length]; what fills no row is left out."""
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length).long()


def split(length: int) -> int:
    """So many texts fill one of `length` tokens, where a model writes none of more than WRITTEN_TOKENS."""
    return -(-length // WRITTEN_TOKENS)


def text_tokens(config: Any) -> list[int]:
    """All tokens but those that stand for images or sound. config: of transformers."""
    return sorted(set(range(config.get_text_config().vocab_size)) - set(_tokens_of_other_inputs(config)))


def read_tokenizer(model: str) -> Any:
    """The tokenizer of a model, None where it has none that transformers can read. model: hub id or folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception:  # of many kinds; prompts can do without
        return None
    # Of a folder without its files, transformers makes some models' tokenizers with special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def end_tokens(model: str, text: Any, tokenizer: Any) -> list[int]:
    """Tokens with which a model ends what it says.

    Args:
        model: hub id or folder.
        text: configuration of the language model.
        tokenizer: of transformers, or None.
    """
    from transformers import GenerationConfig

    named = [getattr(text, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    with suppress(OSError):  # it has none of its own
        named.append(GenerationConfig.from_pretrained(model).eos_token_id)
    ends: set[int] = set()
    for name in named:
        ends.update(name if isinstance(name, list) else [] if name is None else [name])
    return sorted(ends)


def _tokens_of_other_inputs(config: Any) -> list[int]:
    """Tokens by which a model that reads more than text marks where the rest stands; none for others."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig) or config.get_text_config() is config:
        return []
    marks = [value for name, value in vars(config).items() if re.fullmatch(r".+_token_(id|index)", name)]
    own = {config.get_text_config().bos_token_id, config.get_text_config().eos_token_id}
    return sorted({mark for mark in marks if isinstance(mark, int)} - own)
