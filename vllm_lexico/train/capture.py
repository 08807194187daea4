"""K (after RoPE) and V of every layer, taken from a transformers model while it reads training text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lexico_kernels.memory.layout import KV

from vllm_lexico.train.attention import ATTENTION_NAME, exact_attention, heard_attention, listening
from vllm_lexico.train.in_turn import hold_in_turn, read_all
from vllm_lexico.train.model import model_class, read_config
from vllm_lexico.train.quantized import OF_QUANTIZED, Scheme, UnreadWeightsError, dense_weights
from vllm_lexico.train.rotary import as_vllm_orders, settle_rotary

WIDER_WINDOWS = ("cohere2", "cohere2_moe")  # vLLM's see one token more than transformers', as these were trained
TOGETHER_TOKENS = 1 << 17  # that are under way where a model's layers come one after the other
SKIPPED_TOKENS = 16  # the first tokens of a sequence stay exact in the cache and look like no others


def load_model(
    model: str,
    device: str,
    dtype: str,
    overrides: str = "",
    max_model_len: int | None = None,
    *,
    in_turn: bool = False,
) -> Any:
    """The model in eval mode, with the attention that `capture` listens to and keys turned as vLLM turns them.

    Quantized weights are taken as what they stand for, see `quantized`.

    Args:
        model: hub id or folder.
        device: where its weights go.
        dtype: "auto" for the checkpoint's own, or a name.
        overrides: of its configuration, a JSON object, or "".
        max_model_len: see `settle_rotary`.
        in_turn: its layers wait in host memory, see `in_turn`.

    Raises:
        ValueError: the checkpoint lacks weights, or they are of a kind that is not read here, or needs a package which
            is not there; its layers cannot wait.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, heard_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
    config = read_config(model, overrides)
    loaded, report = _read_weights(model, config, bool(overrides), dtype, device)
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model} lacks {len(lacking)} of its weights, as {lacking[0]}; allowed are whole checkpoints; fetch it "
            f"again"
        )
    if stray := sorted(name for name in report["unexpected_keys"] if name.endswith(OF_QUANTIZED)):
        raise ValueError(
            f"{model} has scales of quantized weights, as {stray[0]}, and its config.json does not say how they are "
            f"quantized; allowed: a quantization_config there; copy it from hf_quant_config.json if that file is "
            f"there, or train on the model that it was made of: its dictionary serves its quantized twins too"
        )
    settle_rotary(loaded, max_model_len)
    text = loaded.config.get_text_config()
    if text.model_type in WIDER_WINDOWS and text.sliding_window is not None:
        text.sliding_window += 1
    if in_turn:
        hold_in_turn(loaded, text_model(loaded), text.num_hidden_layers, device)
        return loaded.eval()
    return loaded.to(device).eval()


def _read_weights(model: str, config: Any, overridden: bool, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The model on the CPU, and what transformers reports of its loading. See `load_model`."""
    taken = model_class(config)
    options = {"dtype": dtype, "attn_implementation": ATTENTION_NAME, "output_loading_info": True}
    try:
        scheme = Scheme.of(config)
        if scheme is None:
            return taken.from_pretrained(model, **options, **({"config": config} if overridden else {}))
        wanted = (config.dtype or torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
        weights = dense_weights(model, scheme, wanted, device)
        del config.quantization_config
        return taken.from_pretrained(None, config=config, state_dict=weights, **options | {"dtype": wanted})
    except (ImportError, UnreadWeightsError) as error:  # of a package that reads a kind of quantized weights, or ours
        raise ValueError(
            f"the weights of {model} cannot be read ({' '.join(str(error).split())}); allowed are those that "
            f"transformers reads with what is installed, and FP8, AWQ, GPTQ, compressed-tensors and MXFP4; install a "
            f"package that is named, or train on the model that they were made of: its dictionary serves its quantized "
            f"twins too"
        ) from error


def text_model(model: Any) -> Any:
    """The decoder of a model of `load_model`, without what reads images."""
    base = model.base_model
    if base is model:  # Llama 4's names no base
        return model.model
    return getattr(base, "language_model", base)


@dataclass
class _Listener:
    """An attention function that copies K and V of some positions and layers to a store.

    Args:
        store: [layers, 2, tokens, Hk, D].
        rows: layer -> row of the store.
        queries: float32 [layers, Hk, D] or None; gets the squares of the queries of each head's group added.
        model_type: of the text model.
        positions: int64 [batch, kept], of the batch that is read.
        offset: where in the store its tokens go.
        heard: layers that have called.
    """

    store: torch.Tensor
    rows: dict[int, int]
    queries: torch.Tensor | None
    model_type: str
    positions: torch.Tensor
    offset: int
    heard: set[int]

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `exact_attention`."""
        row = self.rows.get(getattr(module, "layer_idx", -1))
        if row is not None:
            self.heard.add(module.layer_idx)
            kind = self.model_type
            self._keep(row, module.layer_idx, as_vllm_orders(query, kind), as_vllm_orders(key, kind), value)
        return exact_attention(module, query, key, value, mask, **kwargs)

    def _keep(self, row: int, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        batch, heads, _, dim = key.shape
        if value.shape != key.shape or self.store.shape[3:] != (heads, dim):
            raise ValueError(
                f"layer {layer} has K {tuple(key.shape)} and V {tuple(value.shape)}; allowed are models with the same "
                f"KV heads and head size in every coded layer, for K and V alike; use another model"
            )
        at = self.positions[:, None, :, None].expand(batch, heads, -1, dim)
        for kv, vectors in enumerate((key, value)):
            kept = vectors.gather(2, at).transpose(1, 2).flatten(0, 1)
            self.store[row, kv, self.offset : self.offset + len(kept)] = kept
        if self.queries is not None:
            squares = query[:, :, SKIPPED_TOKENS:].float().square().sum((0, 2))
            self.queries[row] += squares.view(heads, -1, dim).sum(1)


@torch.no_grad()
def capture(
    model: Any,
    sequences: torch.Tensor,
    kept: int,
    layers: Iterable[int],
    shape: tuple[int, int],
    seed: int,
    batch: int,
    *,
    furthest: int = 0,
    queries: torch.Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """K and V of random positions of some texts.

    Args:
        model: of `load_model`.
        sequences: int64 [count, length] token ids.
        kept: positions per sequence, random, none of the first 16.
        layers: which ones.
        shape: (Hk, D).
        seed: of the positions.
        batch: sequences per pass.
        furthest: every other pair of sequences is read as if it stood somewhere in a context of so many tokens (0: all
            at its start), which turns keys as a long context does and costs nothing.
        queries: float32 [layers, Hk, D] to which the squares of all queries of a head's group are added, if given.
        advance: told of the tokens that were read since the last call.

    Returns:
        [layers, 2, sequences * kept, Hk, D] in the model's dtype, on its device, sequence by sequence.

    Raises:
        ValueError: a layer has no ordinary K and V, or some that are not finite.
    """
    count, length = sequences.shape
    rows = {layer: row for row, layer in enumerate(layers)}
    size = (len(rows), 2, count * kept, *shape)
    store = torch.zeros(size, dtype=model.dtype, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    reader, model_type = text_model(model), model.config.get_text_config().model_type
    heard: set[int] = set()

    def read(at: int, ids: torch.Tensor, addresses: torch.Tensor, positions: torch.Tensor) -> None:
        listener = _Listener(store, rows, queries, model_type, positions.to(model.device), at * kept, heard)
        with listening(listener.attention):
            reader(ids.to(model.device), position_ids=addresses.to(model.device), use_cache=False)
        if advance is not None:
            advance(ids.numel())

    reads = []
    for at in range(0, count, batch):
        ids = sequences[at : at + batch]
        first = torch.randint(max(furthest - length, 0) + 1, (len(ids), 1), generator=generator)
        first[(torch.arange(at, at + len(ids)) // 2) % 2 == 0] = 0  # pairs, as texts come from sources in turn
        order = torch.rand(len(ids), length - SKIPPED_TOKENS, generator=generator).argsort(1)
        positions = order[:, :kept] + SKIPPED_TOKENS
        reads.append(partial(read, at, ids, first + torch.arange(length), positions))
    read_all(reader, reads, TOGETHER_TOKENS // (batch * length))
    _check_heard(store, rows, queries, heard)
    return store


def _check_heard(store: torch.Tensor, rows: dict[int, int], queries: torch.Tensor | None, heard: set[int]) -> None:
    """ValueError where a layer did not call, or its vectors cannot be learned."""
    silent = sorted(rows.keys() - heard)
    if silent:
        raise ValueError(
            f"layers {silent} have no K and V of ordinary attention; allowed are models whose coded layers all have; "
            f"take another model"
        )
    for layer, row in rows.items():
        checked = {f"{kv}s": store[row, at] for at, kv in enumerate(KV)}
        if queries is not None:
            checked["queries"] = queries[row]
        for name, vectors in checked.items():
            check_finite(vectors, layer, name)


def check_finite(vectors: torch.Tensor, layer: int, name: str) -> None:
    """Refuse what cannot be learned from.

    Args:
        vectors: of any shape.
        layer: the model's layer that they belong to.
        name: what they are, in the plural.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    if not all(extreme.isfinite() for extreme in torch.aminmax(vectors)):
        dtype = str(vectors.dtype).removeprefix("torch.")
        raise ValueError(
            f"layer {layer} cannot be learned, as its {name} are NaN or infinite in {dtype}; allowed are finite "
            f"numbers; try --dtype bfloat16 or float32, and if that does not help, fix the model's weights"
        )
