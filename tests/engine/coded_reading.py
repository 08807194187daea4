"""How well a model predicts a text in transformers where it reads distant tokens as codes give them back.

As an engine that computes a text in chunks: all queries of a chunk read the sinks, the window before the chunk's first
token, in whole pages, and the chunk itself as they are, and what lies between from codes. Only layers that are coded
read so; windows, learned sinks and soft caps are the model's own.
"""

from pathlib import Path
from typing import Any

import torch
from lexico_kernels import CodeLayout
from lexico_kernels.reference import decode_heads, encode_heads
from torch import Tensor

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.serve.coding_plan import MAX_WAITING_TOKENS


class CodedReading:
    """A model of `load_model` in float32 and its codec.

    Args:
        model: folder of a checkpoint.
        max_model_len: of the engine.
        dictionary: of the model; None to read all tokens as they are.
        settings: LEXICO's.
        chunk: tokens that are computed together.
        block_tokens: of a page of codes.
    """

    def __init__(
        self,
        model: Path,
        max_model_len: int,
        dictionary: Dictionary | None,
        settings: LexicoConfig,
        chunk: int,
        block_tokens: int,
    ) -> None:
        from vllm_lexico.train.capture import load_model
        from vllm_lexico.train.model import read_facts

        facts = read_facts(str(model), max_model_len=max_model_len).fingerprint
        self.model = load_model(str(model), "cpu", "float32", max_model_len=max_model_len)
        self.layers, self.dictionary, self.settings, self.chunk = facts.layers, dictionary, settings, chunk
        sparsity = settings.sparsity
        self.layout = CodeLayout(
            facts.head_dim, facts.num_kv_heads, sparsity.key, sparsity.value, settings.codec, block_tokens, 4
        )

    @torch.no_grad()
    def scores(self, tokens: list[int]) -> list[float]:
        """Log-probabilities of a text's tokens but the first."""
        from vllm_lexico.train.attention import listening

        with listening(self._attend):
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].tolist()

    def _attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """See `exact_attention`."""
        from vllm_lexico.train.attention import exact_attention

        if self.dictionary is not None and module.layer_idx in self.layers:
            read = [self._code(module.layer_idx, kv, vectors) for kv, vectors in (("key", key), ("value", value))]
            key, value = torch.cat((key, read[0]), 2), torch.cat((value, read[1]), 2)
            mask = self._mask(query.shape[2])
        return exact_attention(module, query, key, value, mask, **kwargs)

    def _code(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        """All tokens' vectors [1, Hk, T, D] as codes give them back."""
        assert self.dictionary is not None
        book = self.dictionary.codebook(layer, kv, self.layout.sparsity(kv))
        records = encode_heads(vectors[0].transpose(0, 1), book, self.layout, kv, self.settings.relative_error)
        return decode_heads(records, book, self.layout, kv, torch.float32).transpose(0, 1)[None]

    def _mask(self, count: int) -> Tensor:
        """bool [1, 1, T, 2 T]: which tokens each reads as they are, then which from codes."""
        page, at = self.layout.tail_tokens, torch.arange(count)
        first = at // self.chunk * self.chunk
        raw_start = (first - max(self.settings.window, MAX_WAITING_TOKENS)).clamp(min=0) // page * page
        raw = (at >= raw_start[:, None]) | (at < -(-self.settings.sinks // page) * page)
        past = at[:, None] >= at
        return torch.cat((past & raw, past & ~raw), 1)[None, None]
