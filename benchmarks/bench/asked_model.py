"""A language model that computes a text once, and is then asked about it with its cache read back in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.coded_model import CodedPerplexity

SCORES_AT_ONCE = 1 << 28  # float32 numbers: 1 GiB
STEPS_PER_LOOK = 4  # whether all answers have ended is asked every so many tokens, since the GPU has to be waited for

History = list[tuple[Tensor, Tensor]]  # keys and values [C, Hk, L, D] of each layer, read in C ways


@dataclass
class _Computing:
    """Attention of one text from its start; keeps keys and values, [1, Hk, L, D] of each layer."""

    history: History = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.history.append((key.contiguous(), value.contiguous()))
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@dataclass
class _Reading:
    """Attention of B sequences that go on from a text, equally many from each of the C ways in which it is read.

    history: of the text. room: tokens that sequences may have of their own. padding: int64 [B], so many of the first of
    these are none. drawn: float32 [layers, Hk, L] or None; becomes the log of the largest attention that each token of
    the text has drawn so far. energy: float32 [layers, Hk, D] or None; the squares of queries are added, times the
    share of their attention that goes to the text. Both for one sequence only. past: tokens that sequences have.
    """

    history: History
    room: int
    padding: Tensor
    drawn: Tensor | None = None
    energy: Tensor | None = None
    past: int = 0
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1))
        near, near_lse = self._to_own(grouped, *self._kept(layer, key, value), scale)
        keys, values = self.history[layer]
        ways = grouped.unflatten(0, (len(keys), -1)).transpose(1, 2)  # [C, Hk, Q, G, T, D]
        far, far_lse = attention_with_lse(ways.flatten(2, 4).contiguous(), keys, values, scale)
        far = far.unflatten(2, ways.shape[2:5]).transpose(1, 2).flatten(0, 1)
        far_lse = far_lse.unflatten(2, ways.shape[2:5]).transpose(1, 2).flatten(0, 1)
        lse = torch.logaddexp(near_lse, far_lse)
        if self.drawn is not None:
            self._listen(self.drawn[layer], grouped[0].flatten(1, 2), keys[0], lse[0].flatten(1, 2), scale)
        if self.energy is not None:
            share = (far_lse - lse).exp()[0, ..., None]
            self.energy[layer] += (share * grouped[0].float().square()).sum((1, 2))
        merged = near * (near_lse - lse).exp()[..., None] + far.float() * (far_lse - lse).exp()[..., None]
        return merged.flatten(1, 2).to(query.dtype)

    def _kept(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequences so far, with these."""
        if layer not in self.own:
            shape = (*key.shape[:2], self.room, key.shape[3])
            self.own[layer] = (key.new_empty(shape), value.new_empty(shape))
        stop = self.past + key.shape[2]
        for store, new in zip(self.own[layer], (key, value), strict=True):
            store[:, :, self.past : stop] = new
        keys, values = self.own[layer]
        return keys[:, :, :stop], values[:, :, :stop]

    def _to_own(self, grouped: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """float32 [B, Hk, G, T, D], and lse [B, Hk, G, T], of queries of that shape to the sequences' own tokens."""
        scores = torch.einsum("bhgtd,bhsd->bhgts", grouped.float(), keys.float()) * scale
        place = torch.arange(keys.shape[2], device=keys.device)
        query = place[self.past :, None]
        # What pads sees itself, so that it is a number and not NaN; nothing else sees it.
        seen = (place <= query) & ((place >= self.padding[:, None, None]) | (place == query))
        scores.masked_fill_(~seen[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        return torch.einsum("bhgts,bhsd->bhgtd", (scores - lse[..., None]).exp(), values.float()), lse

    def _listen(self, drawn: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float) -> None:
        """drawn [Hk, L]: raised to what queries [Hk, n, D] of these lse [Hk, n] give to keys [Hk, L, D]."""
        keys = keys.float().transpose(1, 2)
        rows = max(1, SCORES_AT_ONCE // drawn.numel())
        for some, of_some in zip(queries.split(rows, 1), lse.split(rows, 1), strict=True):
            scores = torch.baddbmm(-of_some[..., None], some.float(), keys, alpha=scale)
            torch.maximum(drawn, scores.amax(1), out=drawn)


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, n, D] of queries of that shape to all keys and values [B, H, L, D], and its lse [B, H, n]."""
    if query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    scores = query.float() @ key.float().transpose(2, 3) * scale
    return scores.softmax(-1) @ value.float(), scores.logsumexp(-1)


class AskedModel(CodedPerplexity):
    """A causal language model that is asked about texts; what it reads of them is given.

    Args, errors: see `CodedPerplexity`.
    """

    _phase: _Computing | _Reading

    def __init__(self, model_path: str, device: torch.device | str) -> None:
        self._phase = _Computing()
        super().__init__(model_path, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._phase.attend(layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)

    @torch.no_grad()
    def compute(self, ids: list[int]) -> History:
        """Exact keys and values [1, Hk, L, D] of a text of L tokens."""
        self._phase = _Computing()
        self._run(self.model.base_model, torch.tensor([ids], device=self.device))
        return self._phase.history

    @torch.no_grad()
    def drawn(self, history: History, texts: Sequence[list[int]], energy: Tensor | None = None) -> Tensor:
        """The largest attention that each token of a text draws, per KV head, when the model goes on in several ways.

        KVzip's score (arXiv 2505.23416) where `texts` ask to repeat the text and do so. Queries of all of a KV head's
        heads count, and attention to all that they see.

        Args:
            history: of the text, [1, Hk, L, D] of each layer.
            texts: token ids that follow it, each by itself.
            energy: float32 [layers, Hk, D], raised by that of the queries that look at the text (see `_Reading`).

        Returns:
            Its natural logarithm, float32 [layers, Hk, L].
        """
        _, Hk, L, _ = history[0][0].shape
        drawn = torch.full((len(history), Hk, L), -torch.inf, device=self.device)
        for ids in texts:
            padding = torch.zeros(1, dtype=torch.long, device=self.device)
            self._read(_Reading(history, len(ids), padding, drawn, energy), [ids])
        return drawn

    @torch.no_grad()
    def answer(self, history: History, prompts: Sequence[list[int]], most: int, ends: set[int]) -> list[list[int]]:
        """Greedy answers of all prompts with each way of reading the text.

        Args:
            history: in C ways.
            prompts: Q token ids that follow the text.
            most: tokens per answer.
            ends: tokens that end an answer.

        Returns:
            Token ids of C * Q answers, way by way; an end and what follows it are left out.
        """
        ways, longest = len(history[0][0]), max(map(len, prompts))
        padding = torch.tensor([longest - len(ids) for ids in prompts] * ways, device=self.device)
        reading = _Reading(history, longest + most, padding)
        ending = torch.tensor(sorted(ends), device=self.device)
        token = self._read(reading, [[0] * (longest - len(ids)) + ids for ids in prompts] * ways)
        said, ended = [token], torch.isin(token, ending)
        for step in range(1, most):
            if step % STEPS_PER_LOOK == 0 and bool(ended.all()):
                break
            token = self._read(reading, token[:, None])
            ended |= torch.isin(token, ending)
            said.append(token)
        answers = torch.stack(said, 1).tolist()
        return [ids[: next((i for i, one in enumerate(ids) if one in ends), len(ids))] for ids in answers]

    def _read(self, reading: _Reading, ids: Any) -> Tensor:
        """The likeliest next token int64 [B] after these [B, T]."""
        self._phase, given = reading, torch.as_tensor(ids, device=self.device)
        place = torch.arange(given.shape[1], device=self.device) + reading.past - reading.padding[:, None]
        at = place.clamp(min=0) + reading.history[0][0].shape[2]
        hidden = self._run(partial(self.model.base_model, position_ids=at), given).last_hidden_state[:, -1]
        reading.past += given.shape[1]
        return self.model.get_output_embeddings()(hidden).argmax(-1)
