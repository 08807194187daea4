"""Which KV heads get more atoms where sparsities differ: those that are asked most when a model repeats a text.

At 6.25 % they keep more of the answers about long documents than as many bytes dealt out evenly (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.tensors import ASKED_SHARES


def uneven_sparsities(
    dictionary: Dictionary, layers: Sequence[int], heads: slice, mean: int, low: int, high: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Atoms per vector of each KV head of a rank, in bytes at most `mean` on average over the rank's heads.

    Args:
        dictionary: of the model, with the share of each head's tokens that are asked.
        layers: indices of a rank's layers; those that are not coded are passed over.
        heads: of each layer, those of the rank.
        mean: atoms per vector of an even code of as many bytes.
        low: of most heads.
        high: of those that are asked most, as many as the bytes allow.

    Returns:
        (layer, atoms of each of the rank's heads) of each layer, in order.

    Raises:
        ValueError: the dictionary does not say which heads are asked, or the bytes are too few for one head in `high`.
    """
    shares = dictionary.tensors.get(ASKED_SHARES)
    if shares is None:
        raise ValueError(
            f"the dictionary of {dictionary.info.model_name} does not say which heads are asked much, as the setting "
            "uneven needs; add it to the file with `vllm-lexico train MODEL --continue-from FILE --rounds 0`, or leave "
            "the setting out"
        )
    of_layer = dict(zip(dictionary.info.fingerprint.layers, shares[:, heads].tolist(), strict=True))
    coded = {index: of_layer[index] for index in layers if index in of_layer}
    # A record has 2 (S + 1) bytes, so bytes are even in S.
    count = sum(map(len, coded.values()))
    left = count * (mean - low) // (high - low)
    if coded and not left:
        raise ValueError(
            f"LEXICO setting uneven is {[low, high]} beside a sparsity of {mean}, which leaves none of a rank's "
            f"{count} KV heads with {high}; allowed: pairs that give it to one at least; "
            f"choose a smaller high or a larger sparsity, or leave uneven out"
        )
    ranked = sorted((-share, index, head) for index, own in coded.items() for head, share in enumerate(own))
    chosen = {(index, head) for _, index, head in ranked[:left]}
    return tuple(
        (index, tuple(high if (index, head) in chosen else low for head in range(len(own))))
        for index, own in coded.items()
    )
