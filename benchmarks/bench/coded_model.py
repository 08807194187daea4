"""A language model that reads distant tokens as a coded cache would give them back, and how well it predicts text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm.auto import tqdm

from vllm_lexico.train.attention import exact_attention

ATTENTION_NAME = "lexico_coded"
LOGITS_AT_ONCE = 1 << 26  # float32 numbers: 256 MiB

Codec = Callable[[int, str, Tensor], Tensor]


class CodedPerplexity:
    """A causal language model that reads distant tokens through a codec.

    A codec is called as `codec(layer, kv, vectors [tokens, Hk, D])`, kv "key" (after RoPE) or "value", and returns what
    would be read back, of the same shape and dtype.

    Args:
        model_path: a checkpoint's folder or hub id.
        device: "cuda" (bf16) or "cpu" (float32).
        sinks, window: tokens that are read as they are, see `read_raw`.
        skip: the first tokens of a text window give no score.
        coded: layers that read through the codec; None for all. The others may have windows, learned sinks and soft
            caps, as the model says.

    Attributes:
        seconds: duration of the last run.

    Raises:
        ValueError: the model's attention or output is more than the usual, or an argument is out of range.
    """

    _running: CodedPerplexity | None = None  # transformers knows the attention by name only: whose call it is
    seconds = 0.0

    def __init__(
        self,
        model_path: str,
        device: torch.device | str,
        sinks: int = 16,
        window: int = 128,
        skip: int = 256,
        coded: Collection[int] | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if skip < 0:
            raise ValueError(f"skip {skip}; allowed: from 0; 256 is usual")
        self.read_raw(sinks, window)
        self.device, self.skip, self.coded = torch.device(device), skip, coded
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
        if coded is not None:
            ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=self.dtype, attn_implementation=ATTENTION_NAME)
        self.model = model.to(self.device).eval()
        self._codec: Codec | None = None
        self._check_head()

    def read_raw(self, sinks: int, window: int, chunk: int = 1, page: int = 1) -> None:
        """Set which tokens are read as they are.

        With the default `chunk` and `page` each query reads its own newest `window` tokens, as a step of decode does.
        An engine that computes a text in chunks reads, for all queries of a chunk, the window before its first token,
        in whole pages, and the chunk itself.

        Args:
            sinks: first tokens of the text, from 0.
            window: newest tokens up to a chunk's first, that one included; from 1.
            chunk: tokens computed together, from 1.
            page: tokens per page of full precision, from 1.

        Raises:
            ValueError: a number is out of range.
        """
        if sinks < 0 or min(window, chunk, page) < 1:
            raise ValueError(
                f"sinks {sinks}, window {window}, chunk {chunk}, page {page}; allowed: from 0 for sinks and from 1 for "
                f"the others; sinks of 16 and a window of 128 are usual"
            )
        self.sinks, self.window, self.chunk, self.page = sinks, window, chunk, page
        self._masks: dict[int, Tensor] = {}

    @torch.no_grad()
    def negative_log_likelihood(self, windows: Tensor, codec: Codec | None = None, batch: int = 1) -> Tensor:
        """Mean loss of each text window in nats a token, float64 [count]; tokens 0 to `skip` are not scored.

        windows: int64 [count, length]. codec: gets all distant vectors of a batch at once; None reads all as it is.
        batch: windows a pass. ValueError when they are too short to score.
        """
        count, length = windows.shape
        if length < self.skip + 2 or batch < 1:
            raise ValueError(
                f"windows of {length} tokens, batch {batch}; allowed: more than {self.skip + 1} tokens, of which "
                f"{self.skip + 1} are not scored, and a batch from 1; lengthen the windows or skip fewer"
            )
        started, losses = time.perf_counter(), []
        self._codec = codec
        for at in tqdm(range(0, count, batch), desc="reading text", unit="batch", leave=False):
            ids = windows[at : at + batch].to(self.device)
            hidden = self._run(self.model.base_model, ids).last_hidden_state
            losses.append(self._losses(hidden[:, self.skip : -1], ids[:, self.skip + 1 :]))
        result = torch.cat(losses).cpu()
        self.seconds = time.perf_counter() - started
        return result

    def _run(self, module: Any, ids: Tensor) -> Any:
        CodedPerplexity._running = self
        try:
            return module(ids, use_cache=False)
        finally:
            CodedPerplexity._running = None

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of each row, float64 [B]; hidden [B, T, width] goes through the head piece by piece."""
        head = self.model.get_output_embeddings()
        rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        pieces = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = [cross_entropy(head(piece).float(), wanted, reduction="none") for piece, wanted in pieces]
        return torch.cat(losses).view(targets.shape).double().mean(1)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Scores come from hidden states times the head: refuse models that do more (soft caps, scales)."""
        ids = torch.arange(8, device=self.device)[None]
        logits, head = self._run(self.model, ids).logits.float(), self.model.get_output_embeddings()
        hidden = self._run(self.model.base_model, ids).last_hidden_state
        if head is None or not torch.allclose(head(hidden).float(), logits, rtol=4e-3, atol=1e-3):
            raise ValueError(
                f"{self.model.config.model_type} does more to its logits than multiply; allowed are models that do "
                f"not; take another model"
            )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention [B, Hq, T, D] of all positions: query [B, Hq, T, D], key and value [B, Hk, T, D]."""
        length, far = key.shape[2], self._far(key.shape[2])
        if self._codec is None or not len(far):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        groups = query.shape[1] // key.shape[1]
        both: list[Tensor] = []
        for kv, vectors in (("key", key), ("value", value)):
            distant = vectors[:, :, far.start : far.stop].transpose(1, 2)
            read = self._codec(layer, kv, distant.flatten(0, 1)).reshape(distant.shape).transpose(1, 2)
            # Repeated for its queries: with a mask, grouped heads would send SDPA to its slow path on a GPU.
            both.append(torch.cat((vectors, read), 2).repeat_interleave(groups, 1))
        keys, values = both
        return scaled_dot_product_attention(query, keys, values, attn_mask=self._mask(length), scale=scale)

    def _far(self, length: int) -> range:
        """Positions that some query reads from codes."""
        return range(self.sinks, int(self._raw_starts(torch.tensor([length - 1]))))

    def _raw_starts(self, positions: Tensor) -> Tensor:
        """First position after the sinks that queries at these positions read as it is; int64, as `positions`."""
        first = positions // self.chunk * self.chunk
        return (first - self.window + 1).clamp(min=0) // self.page * self.page

    def _mask(self, length: int) -> Tensor:
        """bool [T, T + far]: which raw, then which coded tokens each position reads; each of its past exactly once."""
        if length not in self._masks:
            at = torch.arange(length, device=self.device)
            past = at[:, None] >= at
            raw = (at >= self._raw_starts(at)[:, None]) | (at < self.sinks)
            far = self._far(length)
            self._masks[length] = torch.cat((past & raw, (past & ~raw)[:, far.start : far.stop]), 1)
        return self._masks[length]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; texts are whole, so that the mask of coded layers is always the causal one."""
    running, sliding = CodedPerplexity._running, kwargs.get("sliding_window")
    assert running is not None, "only CodedPerplexity runs this model"
    if running.coded is not None and module.layer_idx not in running.coded:
        return exact_attention(module, query, key, value, mask, scaling=scaling, **kwargs)
    unusual = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unusual or (sliding is not None and sliding < key.shape[2]) or key.shape != value.shape:
        raise ValueError(
            f"layer {module.layer_idx} has {unusual or 'sliding or uneven'} attention; allowed are models of plain "
            f"causal attention; take another model or windows shorter than its own"
        )
    attended = running.attend(module.layer_idx, query, key, value, scaling)
    return attended.transpose(1, 2).contiguous(), None


def ratio(nll: Tensor, base: Tensor) -> tuple[float, float]:
    """Perplexity over that of `base`, with the half-width of its 95 % interval.

    nll, base: [count], losses of the same windows. The interval is the normal one of the mean difference, so with few
    windows it is too narrow; with one it is nan.
    """
    differences = (nll - base).double()
    value = math.exp(float(differences.mean()))
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return value, 1.96 * error * value
