"""How often each head's tokens are asked for: attention that they draw when the model repeats a text word for word.

A head's score of a token is KVzip's (arXiv 2505.23416, section 3): the largest attention that it draws meanwhile. The
best third of all scores of a text, whatever their layer and head, are the tokens that are asked most. Texts are short
enough to be repeated in one piece, so that a single pass reads text and repetition, whatever layers a model has.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_lexico.train.attention import exact_attention, listening
from vllm_lexico.train.capture import SKIPPED_TOKENS, check_finite, text_model
from vllm_lexico.train.in_turn import read_all

REPEAT = "\n\nRepeat the text above word for word{where}."
ASKED_SHARE = 1 / 3  # of all (layer, head, token)
TEXTS = {"cuda": (12, 4096), "cpu": (4, 512)}  # texts, and tokens of each, by kind of device
SCORES_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 23}  # float32 numbers
_MARK = "<|the text goes here|>"


@dataclass(frozen=True)
class Asking:
    """What is read to measure shares.

    Args:
        texts: how many.
        tokens: of each text; 0 where the model is too short for any.
        before: token ids before a text.
        after: token ids between a text and its repetition.
    """

    texts: int
    tokens: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @staticmethod
    def of(tokenizer: Any, kind: str, longest: int) -> "Asking":
        """For a kind of device. tokenizer: of transformers, or None. longest: tokens that the model reads."""
        before, after = _around(tokenizer)
        count, most = TEXTS[kind]
        tokens = min(most, (longest - len(before) - len(after)) // 2)
        return Asking(count, tokens if tokens > 2 * SKIPPED_TOKENS else 0, before, after)

    @property
    def read_tokens(self) -> int:
        """Tokens that the model reads for all texts."""
        return self.texts * (len(self.before) + len(self.after) + 2 * self.tokens) if self.tokens else 0

    def rows(self, length: int) -> int:
        """Sequences of so many tokens that all texts take."""
        return self.texts * -(-self.tokens // length)

    def cut(self, sequences: torch.Tensor) -> torch.Tensor:
        """Texts int64 [count, tokens] of sequences, int64 [rows, length]: shorter and fewer where those are too few."""
        tokens = min(self.tokens, sequences.numel())
        rows = -(-tokens // sequences.shape[1])
        count = min(self.texts, len(sequences) // rows)
        return sequences[: count * rows].reshape(count, -1)[:, :tokens]


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before a text that is to be repeated, and after it; empty without a tokenizer."""
    if tokenizer is None:
        return (), ()

    def encode(words: str) -> tuple[int, ...]:
        return tuple(tokenizer(words, add_special_tokens=False)["input_ids"])

    asked = REPEAT.format(where="")
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": _MARK + asked}]
        try:
            whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse anything
            whole = ""
        before, mark, after = whole.partition(_MARK)
        if mark:
            return encode(before), encode(after)
    start = tokenizer.bos_token_id
    return () if start is None else (start,), encode(asked + "\n\n")


@dataclass
class _Ear:
    """An attention function that notes what tokens of a text draw from those that repeat it.

    Args:
        drawn: float32 [layers, Hk, tokens]; raised to the natural logarithm of the largest attention drawn.
        rows: layer -> row of it.
        first: position of the text's first token.
        asking: position of the first query that counts.
    """

    drawn: torch.Tensor
    rows: dict[int, int]
    first: int
    asking: int
    heard: set[int] = field(default_factory=set)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `exact_attention`; of one text."""
        layer = getattr(module, "layer_idx", -1)
        if layer in self.rows:
            self.heard.add(layer)
            self._listen(self.drawn[self.rows[layer]], query[0], key[0], kwargs)
        return exact_attention(module, query, key, value, mask, **kwargs)

    def _listen(self, drawn: torch.Tensor, query: torch.Tensor, key: torch.Tensor, given: dict[str, Any]) -> None:
        """One layer: drawn [Hk, tokens], query [Hq, S, D], key [Hk, S, D]; given: as to `exact_attention`."""
        heads, length, dim = key.shape
        scale = dim**-0.5 if given.get("scaling") is None else given["scaling"]
        softcap, sinks = given.get("softcap"), given.get("s_aux")
        keys = key.float().transpose(1, 2)
        place = torch.arange(length, device=key.device)
        grouped = query.unflatten(0, (heads, -1))
        at_once = max(1, SCORES_AT_ONCE[key.device.type] // (len(query) * length))
        stop = self.first + drawn.shape[1]
        for start in range(self.asking, length, at_once):
            some = grouped[:, :, start : start + at_once].float()
            scores = (some.flatten(1, 2) @ keys).unflatten(1, some.shape[1:3]) * scale  # [Hk, G, queries, S]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores.masked_fill_(place > place[start : start + at_once, None], -torch.inf)
            lse = scores.logsumexp(-1)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.float().view(heads, -1, 1))
            shares = scores[..., self.first : stop] - lse[..., None]
            torch.maximum(drawn, shares.amax((1, 2)), out=drawn)


@torch.no_grad()
def drawn_by_repetition(
    model: Any, text: torch.Tensor, layers: Sequence[int], num_kv_heads: int, asking: Asking
) -> torch.Tensor:
    """The largest attention that each token of a text draws, per KV head, when the model repeats the text.

    Queries of all of a KV head's heads count, and attention to all that they see.

    Args:
        model: of `capture.load_model`.
        text: int64 [tokens] token ids.
        layers: which ones; each has full attention.
        num_kv_heads: Hk.
        asking: what stands around it.

    Returns:
        Its natural logarithm, float32 [layers, Hk, tokens], on the model's device.

    Raises:
        ValueError: a number of it is not finite.
    """
    own = text.tolist()
    ids = torch.tensor([[*asking.before, *own, *asking.after, *own]], device=model.device)
    drawn = torch.full((len(layers), num_kv_heads, len(own)), -torch.inf, device=model.device)
    rows = {layer: row for row, layer in enumerate(layers)}
    ear = _Ear(drawn, rows, len(asking.before), ids.shape[1] - len(own))
    with listening(ear.attention):
        text_model(model)(ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None], use_cache=False)
    assert ear.heard == set(layers), "a coded layer has called no attention"
    for layer, row in rows.items():
        check_finite(drawn[row], layer, "attention scores")
    return drawn


def asked_most(drawn: torch.Tensor) -> torch.Tensor:
    """The share of each head's tokens that are among the best third of all.

    Args:
        drawn: float32 [layers, Hk, tokens], the higher the more asked.

    Returns:
        float32 [layers, Hk], 1/3 on average.
    """
    best = drawn.flatten().topk(round(drawn.numel() * ASKED_SHARE)).indices
    marked = torch.zeros(drawn.numel(), device=drawn.device)
    marked[best] = 1
    return marked.view(drawn.shape).mean(2)


def measure_shares(
    model: Any,
    texts: torch.Tensor,
    layers: Sequence[int],
    num_kv_heads: int,
    asking: Asking,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Shares of each head's tokens that are asked most, the mean over texts: float32 [layers, Hk] on the CPU.

    The first tokens of a context, which are never coded, do not count.

    Args:
        model, layers, num_kv_heads, asking: see `drawn_by_repetition`.
        texts: int64 [count, tokens] token ids.
        advance: told of the tokens that were read since the last call.

    Raises:
        ValueError: a score is not finite.
    """
    shares = torch.zeros(len(texts), len(layers), num_kv_heads)

    def measure(number: int) -> None:
        drawn = drawn_by_repetition(model, texts[number], layers, num_kv_heads, asking)
        shares[number] = asked_most(drawn[..., max(0, SKIPPED_TOKENS - len(asking.before)) :]).cpu()
        if advance is not None:
            advance(len(asking.before) + len(asking.after) + 2 * len(texts[number]))

    read_all(text_model(model), [partial(measure, number) for number in range(len(texts))], len(texts))
    return shares.mean(0).clamp(0, 1)


def words_for_shares(shares: torch.Tensor, layers: Sequence[int], texts: torch.Tensor, started: float) -> str:
    """A line of the log. started: `time.monotonic()` when measuring began."""
    by_layer = shares.mean(1)
    order = by_layer.argsort(descending=True, stable=True).tolist()
    most = ", ".join(f"{layers[row]} ({by_layer[row]:.2f})" for row in order[:4])
    count, tokens = texts.shape
    return (
        f"asked most when a text is repeated: layers {most}; {count} text{'s' * (count != 1)} of {tokens} tokens in "
        f"{time.monotonic() - started:.1f} s"
    )
