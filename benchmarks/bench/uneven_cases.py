"""How bytes are dealt out to the tokens of a text: the cases that `uneven.py` compares, at equal bytes each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from lexico_kernels.memory.layout import ENTRY_BYTES, KV, SCALE_BYTES, SPAN_TOKENS
from torch import Tensor

BLOCK_TOKENS = 128
MASK_BYTES = BLOCK_TOKENS // 8  # which tokens of a head's block have the larger records
ROWS_AT_ONCE = 4096
SCOPES = ("span", "block", "page", "head", "layer", "model")

Pair = tuple[int, int]  # atoms of keys and of values
Coder = Callable[[int, str, Tensor], Tensor]  # as `VectorCodec`


@dataclass(frozen=True)
class Case:
    """One way to deal out bytes.

    name: for rows. mean: atoms of an even code of as many bytes. sparsity: atoms (K, V) of each token; empty for the
    vectors as they are. high: of chosen tokens, or None: all are alike. by: what ranks tokens. scope: among which
    tokens those of the highest rank are chosen; always equally many of all:

      block   each head's, of each block of 128 tokens: pages stay regular
      span    each head's, of each span of 32, which are coded at a time
      page    all heads' of a layer, of each block
      head    each head's, of the whole text
      layer   all heads' of a layer, of the whole text
      model   all

    by_layer: instead of `sparsity`, layer by layer. stretch: of keys, by its name in `restretched`; "" for the
    dictionary's own.
    """

    name: str
    mean: int = 0
    sparsity: Pair | tuple[()] = ()
    high: Pair | None = None
    by: str = "oracle"
    scope: str = "block"
    by_layer: tuple[Pair, ...] = ()
    stretch: str = ""

    def atoms(self, layer: int) -> tuple[Pair, Pair]:
        """Atoms (K, V) of tokens of a layer that are not chosen, and of those that are."""
        low = self.by_layer[layer] if self.by_layer else self.sparsity
        assert len(low) == 2, f"{self.name} codes nothing"
        return low, self.high or low

    @property
    def codes(self) -> bool:
        """Whether anything is coded."""
        return bool(self.sparsity or self.by_layer)

    @property
    def quota(self) -> int:
        """Tokens per head of a block that are chosen: as many as fit the bytes, with a bit mask that says which."""
        if self.high is None:
            return 0
        low, high = self.atoms(0)
        room = BLOCK_TOKENS * (token_bytes(self.mean, self.mean) - token_bytes(*low)) - MASK_BYTES
        return room // (token_bytes(*high) - token_bytes(*low))


def token_bytes(key: int, value: int) -> int:
    """Of a token's two records of so many atoms."""
    return 2 * SCALE_BYTES + ENTRY_BYTES * (key + value)


def cases(layers: int) -> list[Case]:
    """All, the most wanted first."""
    mean_7, mean_15 = ((3, 3), (15, 15)), ((7, 7), (31, 31))
    return [
        Case("exact"),
        Case("even 7", 7, (7, 7)),
        Case("even 15", 15, (15, 15)),
        Case("oracle 3/15", 7, *mean_7),
        Case("oracle 7/31", 15, *mean_15),
        Case("oracle 4/19", 7, (4, 4), (19, 19)),
        Case("oracle 11/31", 15, (11, 11), (31, 31)),
        Case("oracle 3/15 by head", 7, *mean_7, scope="head"),
        Case("oracle 7/31 by head", 15, *mean_15, scope="head"),
        Case("oracle 3/15 by span", 7, *mean_7, scope="span"),
        Case("oracle 3/15 by page", 7, *mean_7, scope="page"),
        Case("oracle 3/15 by model", 7, *mean_7, scope="model"),
        Case("oracle 7/31 by model", 15, *mean_15, scope="model"),
        Case("heads 3/15", 7, *mean_7, by="heads", scope="model"),
        Case("heads 7/31", 15, *mean_15, by="heads", scope="model"),
        Case("heads 3/31", 7, (3, 3), (31, 31), by="heads", scope="model"),
        Case("heads 11/31", 15, (11, 11), (31, 31), by="heads", scope="model"),
        Case("layers 3/15", 7, *mean_7, by="layers", scope="model"),
        Case("layers 7/31", 15, *mean_15, by="layers", scope="model"),
        Case("oracle 3/15 in shares", 7, *mean_7, by="oracle in shares", scope="model"),
        Case("oracle 7/31 in shares", 15, *mean_15, by="oracle in shares", scope="model"),
        Case("mlp 3/15 in shares", 7, *mean_7, by="mlp in shares", scope="model"),
        Case("linear 3/15 in shares", 7, *mean_7, by="linear in shares", scope="model"),
        Case("random 3/15 in shares", 7, *mean_7, by="random in shares", scope="model"),
        Case("mlp 7/31 in shares", 15, *mean_15, by="mlp in shares", scope="model"),
        Case("mlp 3/15", 7, *mean_7, by="mlp"),
        Case("mlp 7/31", 15, *mean_15, by="mlp"),
        Case("linear 3/15", 7, *mean_7, by="linear"),
        Case("random 3/15", 7, *mean_7, by="random"),
        Case("random 7/31", 15, *mean_15, by="random"),
        Case("damage 3/15", 7, *mean_7, by="damage"),
        Case("lost 3/15", 7, *mean_7, by="lost"),
        Case("lost 7/31", 15, *mean_15, by="lost"),
        Case("even 16/14", 15, (16, 14)),
        Case("even 18/12", 15, (18, 12)),
        Case("even 8/6", 7, (8, 6)),
        Case("even 15 far", 15, (15, 15), stretch="far"),
        Case("even 7 far", 7, (7, 7), stretch="far"),
        Case("even 15 pairs", 15, (15, 15), stretch="pairs"),
        Case("even 15 far pairs", 15, (15, 15), stretch="far pairs"),
        Case("finer layers 7", 7, by_layer=finer_layers(layers, 7)),
        Case("finer layers 15", 15, by_layer=finer_layers(layers, 15)),
        Case("oracle keys 3/15", 7, (3, 7), (15, 7)),
        Case("oracle values 3/15", 7, (7, 3), (7, 15)),
        Case("even 31", 31, (31, 31)),
    ]


def finer_layers(layers: int, mean: int) -> tuple[Pair, ...]:
    """Atoms (K, V) per layer, of `mean` at most on average: more where needles die, an atom less elsewhere.

    That is keys of layers 6 to 13 of 28 and values of 14 to 20 (docs/log/2026-11-26.md, "Where a needle is lost").
    """
    keys = range(round(layers * 6 / 28), round(layers * 14 / 28))
    values = range(round(layers * 14 / 28), round(layers * 21 / 28))
    spare = 2 * layers - len(keys) - len(values)
    more_key, more_value = int(0.6 * spare / max(1, len(keys))), int(0.4 * spare / max(1, len(values)))
    return tuple(
        (mean + (more_key if at in keys else -1), mean + (more_value if at in values else -1)) for at in range(layers)
    )


def choose(scores: Tensor, coded: range, case: Case) -> Tensor:
    """Which tokens get the larger records.

    Args:
        scores: float32 [layers, Hk, L], the higher the better.
        coded: positions that are coded at all.
        case: with a quota.

    Returns:
        bool [layers, Hk, L].
    """
    L = scores.shape[2]
    pad, size = -L % BLOCK_TOKENS, SPAN_TOKENS if case.scope == "span" else BLOCK_TOKENS
    blocks = torch.nn.functional.pad(scores, (0, pad)).unflatten(2, (-1, size))
    place = torch.arange(L + pad, device=scores.device).view(blocks.shape[2:])
    is_coded = ((place >= coded.start) & (place < coded.stop)).expand(blocks.shape)
    axes, together = {  # the order of axes, and how many of the last are ranked together
        "span": ((0, 1, 2, 3), 1), "block": ((0, 1, 2, 3), 1), "page": ((0, 2, 1, 3), 2), "head": ((0, 1, 2, 3), 2),
        "layer": ((0, 1, 2, 3), 3), "model": ((0, 1, 2, 3), 4),
    }[case.scope]  # fmt: skip
    shown, mask = blocks.permute(axes), is_coded.permute(axes)
    flat, kept = shown.flatten(4 - together), mask.flatten(4 - together)
    ranked = flat.masked_fill(~kept, -torch.inf).argsort(-1, descending=True).argsort(-1)
    allowed = (kept.sum(-1, keepdim=True) * case.quota) // BLOCK_TOKENS
    chosen = ((ranked < allowed) & kept).reshape(shown.shape)
    return chosen.permute(axes).flatten(2)[..., :L]  # each of these orders is its own inverse


def in_shares(scores: Tensor, shares: Tensor) -> Tensor:
    """Scores by which `choose` takes the best of each head's block, of each head its share of the block's tokens.

    Args:
        scores: [layers, Hk, L].
        shares: [layers, Hk], of a scope "model" on average.

    Returns:
        float32 [layers, Hk, L], 0 where a head's share ends; for the scope "model".
    """
    L = scores.shape[2]
    blocks = torch.nn.functional.pad(scores, (0, -L % BLOCK_TOKENS), value=-torch.inf).unflatten(2, (-1, BLOCK_TOKENS))
    rank = blocks.argsort(-1, descending=True).argsort(-1).flatten(2)[..., :L]
    return shares[..., None] * BLOCK_TOKENS - rank


def mean_bytes(case: Case, layers: int, chosen: Tensor | None, coded: range) -> float:
    """Bytes of a vector's record on average, with its part of the mask; chosen: as `choose` returns."""
    low, high = zip(*(case.atoms(layer) for layer in range(layers)), strict=True)
    if chosen is None:
        return sum(token_bytes(*pair) for pair in low) / (2 * layers)
    share = float(chosen[..., coded.start : coded.stop].float().mean())
    large = sum(token_bytes(*pair) for pair in high) / (2 * layers)
    small = sum(token_bytes(*pair) for pair in low) / (2 * layers)
    return share * large + (1 - share) * small + MASK_BYTES / (2 * BLOCK_TOKENS)


def lost_scores(
    history: Sequence[tuple[Tensor, Tensor]], coded: range, coder: Coder, stretch: Mapping[str, Tensor]
) -> Tensor:
    """What coding loses of a token, which coding itself can know: float32 [layers, Hk, L], the logarithm of energy.

    The energies of its key and of its value, each over the mean of its head.

    Args:
        history: exact keys and values [1, Hk, L, D] of each layer.
        coded: positions that are coded; others have 0.
        coder: whose errors are meant.
        stretch: [layers, Hk, D] by KV, by which errors are divided.
    """
    rows = []
    for layer, both in enumerate(history):
        lost = both[0].new_zeros(*both[0].shape[1:3], dtype=torch.float32)
        for kv, vectors in zip(KV, both, strict=True):
            part = vectors[0, :, coded.start : coded.stop].transpose(0, 1).contiguous()
            error = (coder(layer, kv, part).float() - part.float()) / stretch[kv][layer]
            energy = error.square().sum(-1).T  # [Hk, coded]
            lost[:, coded.start : coded.stop] += energy / energy.mean(1, keepdim=True).clamp(min=1e-20)
        rows.append(lost)
    return torch.stack(rows).clamp(min=1e-20).log()


def read_back(
    layer: int,
    vectors: tuple[Tensor, Tensor],
    wanted: Sequence[Case],
    chosen: Mapping[str, Tensor],
    coded: range,
    coders: Callable[[int, str], Coder],
) -> tuple[Tensor, Tensor]:
    """A layer's keys and values as each case gives them back.

    Args:
        layer: its number.
        vectors: exact keys and values [1, Hk, L, D].
        wanted: C cases.
        chosen: bool [layers, Hk, L] by the name of each case that chooses.
        coded: positions that are coded.
        coders: codec of so many atoms and that stretch.

    Returns:
        Keys and values [C, Hk, L, D].
    """
    both = []
    for at, (kv, exact) in enumerate(zip(KV, vectors, strict=True)):
        read = exact.repeat(len(wanted), 1, 1, 1)
        part = exact[0, :, coded.start : coded.stop].transpose(0, 1).contiguous()
        known: dict[tuple[int, str], Tensor] = {}
        rows = coded.stop - coded.start
        if part.is_cuda and rows:  # kernels are compiled for few sizes then
            part = part[torch.arange(-(-rows // ROWS_AT_ONCE) * ROWS_AT_ONCE, device=part.device) % rows]
        for out, case in zip(read, wanted, strict=True):
            if not case.codes:
                continue
            low, high = ((pair[at], case.stretch if kv == "key" else "") for pair in case.atoms(layer))
            for kind in {low, high} - known.keys():
                known[kind] = coders(*kind)(layer, kv, part)[:rows].transpose(0, 1)
            mask = chosen[case.name][layer, :, coded.start : coded.stop, None] if case.high else None
            new = known[low] if mask is None else torch.where(mask, known[high], known[low])
            out[:, coded.start : coded.stop] = new
        both.append(read)
    return both[0], both[1]
