"""Which layers of a model LEXICO codes: those whose cache grows with the context. No torch and no transformers here."""

from collections.abc import Callable, Iterable
from typing import Any

from vllm_lexico.errors import refusal, shown

# Names that configurations give to kinds of layers. "hybrid" is attention and a state side by side in one layer.
FULL = frozenset({"full_attention", "attention", "hybrid"})
WINDOWED = frozenset({"sliding_attention", "hybrid_sliding"})
WITHOUT_GROWTH = frozenset(
    {"chunked_attention", "linear_attention", "mamba", "mamba2", "recurrent", "conv", "moe", "mlp", "dense", "sparse"}
)
WITH_STATE = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid", "hybrid_sliding"})
NEMOTRON_H = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}
_REMEDY = "serve it without --attention-backend LEXICO, or take another model"

Kinds = list[str]


def coded_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers that LEXICO codes, as in vLLM's layer names ("model.layers.N"), which count all layers.

    Where layers are of different kinds, the full-attention ones; layers with windows only where no attention layer is
    without one (whether such a window ever binds is known when the model is served). Layers that read the keys and
    values of another one have none of their own and are left out.

    Args:
        config: a text config of transformers, or as vLLM holds it in `model_config.hf_text_config`.

    Returns:
        Ascending, at least one.

    Raises:
        ValueError: no layer's cache grows with the context, or the config names a kind of layer that is not known.
    """
    kinds = layer_kinds(config)
    if unknown := sorted(set(map(str, kinds)) - FULL - WINDOWED - WITHOUT_GROWTH):
        known = ", ".join(sorted(FULL | WINDOWED | WITHOUT_GROWTH))
        raise ValueError(refusal(f"a layer of the {_model(config)}", unknown[0], known, _REMEDY))
    own = kinds[: len(kinds) - (_value(config, "num_kv_shared_layers") or 0)]
    for coded in (FULL, WINDOWED):
        if layers := tuple(index for index, kind in enumerate(own) if kind in coded):
            return layers
    raise ValueError(
        f"the {_model(config)} has no attention layer whose cache grows with the context, so there is nothing that "
        f"LEXICO would code; allowed are models with full attention in some of their layers; {_REMEDY}"
    )


def are_mixed(config: Any) -> bool:
    """Whether full attention stands beside layers of other kinds.

    Args:
        config: a text config of transformers, or as vLLM holds it in `model_config.hf_text_config`.
    """
    kinds = set(layer_kinds(config))
    return bool(kinds & FULL) and bool(kinds - FULL)


def state_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers that keep a state per request, coded ones with attention beside it among them.

    Args:
        config: a text config of transformers, or as vLLM holds it in `model_config.hf_text_config`.
    """
    return tuple(index for index, kind in enumerate(layer_kinds(config)) if kind in WITH_STATE)


def layer_kinds(config: Any) -> Kinds:
    """The kind of every layer, in the words of FULL, WINDOWED and WITHOUT_GROWTH where they are known."""
    count = _value(config, "num_hidden_layers")
    for read in (_llama4, _named, _listed, _periodic):
        kinds = read(config, count)
        if kinds is None:
            continue
        if count is not None and len(kinds) < count:
            allowed = f"{count} or more, one per layer"
            raise ValueError(refusal(f"kinds of layers in the {_model(config)}", len(kinds), allowed, _REMEDY))
        return kinds[:count]  # what follows are layers of drafts
    if count is None or _value(config, "num_attention_heads") is None:
        return []
    return ["full_attention"] * count


def _llama4(config: Any, count: int | None) -> Kinds | None:
    """As vLLM's Llama 4 decides: layers with rotary embedding see chunks, if there are chunks."""
    without_rope, named = _value(config, "no_rope_layers"), hasattr(config, "attention_chunk_size")
    if not named or not without_rope:
        return None
    chunked = "chunked_attention" if config.attention_chunk_size else "full_attention"
    return [chunked if rotary else "full_attention" for rotary in without_rope]


def _named(config: Any, count: int | None) -> Kinds | None:
    """From a list of names, or of their letters or numbers."""
    for name in ("layer_types", "layers_block_type"):
        if kinds := _value(config, name):
            return list(kinds)
    if pattern := _value(config, "hybrid_override_pattern"):
        return [NEMOTRON_H.get(letter, letter) for letter in pattern]
    if types := _value(config, "attn_type_list"):  # MiniMax
        return ["full_attention" if kind == 1 else "linear_attention" for kind in types]
    if pattern := _value(config, "hybrid_layer_pattern"):  # MiMo
        return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    return None


def _listed(config: Any, count: int | None) -> Kinds | None:
    """From a list of the attention layers among others: LFM2's, Bamba's."""
    for name, other in (("full_attn_idxs", "conv"), ("attn_layer_indices", "mamba")):
        listed = _value(config, name)
        if listed is not None and count is not None:
            return _where(frozenset(listed).__contains__, other, range(count))
    return None


def _periodic(config: Any, count: int | None) -> Kinds | None:
    """From how often an attention layer comes among others: Jamba's, Qwen3-Next's, Gemma 3's."""
    layers = range(count or 0)
    if period := _value(config, "attn_layer_period"):
        offset = _value(config, "attn_layer_offset") or 0
        return _where(lambda index: index % period == offset, "mamba", layers)
    if interval := _value(config, "full_attention_interval"):
        return _where(lambda index: (index + 1) % interval == 0, "linear_attention", layers)
    pattern = _value(config, "sliding_window_pattern")
    if not pattern or not _value(config, "sliding_window"):
        return None
    if isinstance(pattern, str):  # EXAONE 4's "LLLG": local and global
        return _where(lambda index: pattern[index % len(pattern)] == "G", "sliding_attention", layers)
    return _where(lambda index: (index + 1) % pattern == 0, "sliding_attention", layers)


def _where(full: Callable[[int], bool], other: str, layers: Iterable[int]) -> Kinds:
    return ["full_attention" if full(index) else other for index in layers]


def _value(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _model(config: Any) -> str:
    return f"model of type {shown(_value(config, 'model_type') or type(config).__name__)}"
