"""A Llama in plain torch that reads its cache as the design says: what an engine with codes must answer.

A cold prompt is computed raw. An answer's token reads the sinks and the window raw and everything between from codes,
which the twins of the coding operations make.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lexico_kernels import KV, CodeLayout
from lexico_kernels.reference import decode_heads, encode_heads
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.uneven import uneven_sparsities
from vllm_lexico.serve.coding_plan import MAX_WAITING_TOKENS


@dataclass
class Oracle:
    """Logits of a model, token by token.

    Attributes:
        config: of transformers.
        weights: float32, by their names in the checkpoint.
        dictionary: of the model.
        settings: LEXICO's.
        block_tokens: P.
        num_draft_tokens: by which the window is longer.
    """

    config: Any
    weights: dict[str, Tensor]
    dictionary: Dictionary
    settings: LexicoConfig
    block_tokens: int = 128
    num_draft_tokens: int = 0

    @classmethod
    def of(cls, model: Path, **more: Any) -> "Oracle":
        """Read a checkpoint's folder."""
        from safetensors.torch import load_file
        from transformers import AutoConfig

        weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
        return cls(AutoConfig.from_pretrained(model), weights, **more)

    def regrets(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """By how much the best logit is above that of each token of an answer: 0 where it is the best itself."""
        layout = self._layout()
        shape = 0, self.config.num_key_value_heads, self.config.head_dim
        kept, coded = ([(torch.empty(shape),) * 2] * self.config.num_hidden_layers for _ in range(2))
        tokens, regrets, position = list(prompt), [], 0
        for token in answer:
            logits = self._step(tokens, position, kept, coded, layout)
            regrets.append(float(logits.max() - logits[token]))
            position, tokens = position + len(tokens), [token]
        return regrets

    def _layout(self) -> CodeLayout:
        sparsity, heads = self.settings.sparsity, self.config.num_key_value_heads
        return CodeLayout(
            self.config.head_dim, heads, sparsity.key, sparsity.value, self.settings.codec, self.block_tokens, 4
        )

    def _sparsities(self) -> dict[int, tuple[int, ...]]:
        """Atoms of each KV head by layer where they differ."""
        if self.settings.uneven is None:
            return {}
        layers, heads = range(self.config.num_hidden_layers), slice(0, self.config.num_key_value_heads)
        return dict(
            uneven_sparsities(self.dictionary, layers, heads, self.settings.sparsity.key, *self.settings.uneven)
        )

    def _step(self, tokens: list[int], computed: int, kept: list, coded: list, layout: CodeLayout) -> Tensor:
        """Logits after the last of some new tokens; `computed` came before them. Appends to the cache."""
        count, config = len(tokens), self.config
        sink_end, raw_start = self._coded_range(computed, layout)
        positions = torch.arange(computed, computed + count)
        x = self.weights["model.embed_tokens.weight"][tokens]
        for index in range(config.num_hidden_layers):
            name = f"model.layers.{index}."
            hidden = self._norm(x, f"{name}input_layernorm.weight")
            query, key, value = (
                (hidden @ self.weights[f"{name}self_attn.{part}_proj.weight"].T).view(count, -1, config.head_dim)
                for part in "qkv"
            )
            query, key = self._rotate(query, positions), self._rotate(key, positions)
            kept[index] = tuple(torch.cat(pair) for pair in zip(kept[index], (key, value), strict=True))
            # A code depends on its vector alone, so it is made when it is first read.
            behind = slice(len(coded[index][0]), raw_start)
            made = self._code(index, *(vectors[behind] for vectors in kept[index]), layout)
            coded[index] = tuple(torch.cat(pair) for pair in zip(coded[index], made, strict=True))
            seen = [
                torch.cat((raw[:sink_end], code[sink_end:raw_start], raw[max(sink_end, raw_start) :]))
                for raw, code in zip(kept[index], coded[index], strict=True)
            ]
            attended = self._attend(query, *seen, positions)
            x = x + attended @ self.weights[f"{name}self_attn.o_proj.weight"].T
            hidden = self._norm(x, f"{name}post_attention_layernorm.weight")
            gate, up = (hidden @ self.weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (silu(gate) * up) @ self.weights[f"{name}mlp.down_proj.weight"].T
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self._norm(x[-1:], "model.norm.weight")[0] @ head.T

    def _coded_range(self, computed: int, layout: CodeLayout) -> tuple[int, int]:
        """The positions that a step reads from codes: from the end of the sinks to the window, in whole tail pages."""
        tail = layout.tail_tokens
        sink_end = -(-self.settings.sinks // tail) * tail
        window = max(self.settings.window, MAX_WAITING_TOKENS) + self.num_draft_tokens
        return sink_end, max(computed - window, 0) // tail * tail

    def _code(self, index: int, key: Tensor, value: Tensor, layout: CodeLayout) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens as their codes give them back."""
        if not len(key):
            return key, value
        by_head = self._sparsities().get(index)
        if by_head is None:
            found = [
                self._code_heads(index, None, kv, vectors, layout) for kv, vectors in zip(KV, (key, value), strict=True)
            ]
            return found[0], found[1]
        found = []
        for kv, vectors in zip(KV, (key, value), strict=True):
            heads = []
            for head, own in enumerate(by_head):
                alone = replace(layout, num_kv_heads=1, key_sparsity=own, value_sparsity=own)
                heads.append(self._code_heads(index, (head,), kv, vectors[:, head : head + 1], alone))
            found.append(torch.cat(heads, 1))
        return found[0], found[1]

    def _code_heads(
        self, index: int, heads: Sequence[int] | None, kv: str, vectors: Tensor, layout: CodeLayout
    ) -> Tensor:
        """Vectors of some of a layer's heads, of all with None, as their codes give them back."""
        book = self.dictionary.codebook(index, kv, layout.sparsity(kv), heads=heads)
        records = encode_heads(vectors, book, layout, kv, self.settings.relative_error)
        return decode_heads(records, book, layout, kv, torch.float32)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weights[name], self.config.rms_norm_eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        one, two = x[..., :half], x[..., half:]
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Causal attention [T, Hq D] of queries at these positions."""
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", query, key) * self.config.head_dim**-0.5
        scores = scores.masked_fill(torch.arange(len(key))[None, :] > positions[:, None], -torch.inf)
        return torch.einsum("hts,shd->thd", scores.softmax(-1), value).flatten(1)
