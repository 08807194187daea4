"""Which layers get more atoms where sparsities differ: those that are asked most when a model repeats a text.

At equal bytes they keep more of the answers about long documents than even sparsities do (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.tensors import ASKED_SHARES


def uneven_sparsities(
    dictionary: Dictionary, layers: Sequence[int], mean: int, low: int, high: int
) -> tuple[tuple[int, int], ...]:
    """Atoms per vector of each coded layer among `layers`, in bytes at most `mean` on average.

    Args:
        dictionary: of the model, with the share of each head's tokens that are asked.
        layers: indices of a rank's layers; those that are not coded are passed over.
        mean: atoms per vector of an even code of as many bytes.
        low: of most layers.
        high: of those that are asked most, as many as the bytes allow.

    Returns:
        (layer, atoms) of each, in order.

    Raises:
        ValueError: the dictionary does not say which layers are asked.
    """
    shares = dictionary.tensors.get(ASKED_SHARES)
    if shares is None:
        raise ValueError(
            f"the dictionary of {dictionary.info.model_name} does not say which layers are asked much, as the setting "
            "uneven needs; add it to the file with `vllm-lexico train MODEL --continue-from FILE --rounds 0`, or leave "
            "the setting out"
        )
    of_layer = dict(zip(dictionary.info.fingerprint.layers, shares.mean(1).tolist(), strict=True))
    coded = [index for index in layers if index in of_layer]
    # A record has 2 (S + 1) bytes, so bytes are even in S.
    most = len(coded) * (mean - low) // (high - low)
    chosen = sorted(coded, key=lambda index: -of_layer[index])[:most]
    return tuple((index, high if index in chosen else low) for index in coded)
