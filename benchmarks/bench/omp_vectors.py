"""Captured K and V of one layer with what codes them, kept in a file, and the pages that they are coded into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, CodeLayout
from lexico_kernels.memory.pages import LayerCache
from lexico_kernels.ops import with_fast_atoms
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SEQUENCE_TOKENS = 2048
KEPT_TOKENS = 1024  # of a sequence, as in training
PLANTED_ATOMS, PLANTED_HEADS = 4096, 2
PLANTED_SHARE = 5  # dimensions for each atom of a planted vector
PLANTED_FALL = 0.02  # of the first atom's size is the last one's
PLANTED_NOISE = 0.02


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's vectors and dictionary.

    Attributes:
        vectors: [2, T, Hk, D] in the model's dtype: K after RoPE, and V.
        atoms: of "key" and "value", [H, N, D] in the same dtype; H is Hk, or 1 for shared ones.
        means, stretches: of both, float32 [Hk, D].
        levels: of both, float32 [32, 16]; row s serves sparsity s.
        words: where they come from, for the rows of results.
    """

    vectors: Tensor
    atoms: dict[str, Tensor]
    means: dict[str, Tensor]
    stretches: dict[str, Tensor]
    levels: dict[str, Tensor]
    words: dict[str, str]

    def book(self, kv: str, sparsity: int) -> Codebook:
        """The codebook of "key" or "value", as the product's."""
        levels = self.levels[kv][sparsity].contiguous()
        return with_fast_atoms(Codebook(self.atoms[kv], levels, self.means[kv], self.stretches[kv]), sparsity)

    def to(self, device: str) -> CapturedLayer:
        """The same on a device."""
        atoms, means, stretches, levels = (
            {kv: tensor.to(device) for kv, tensor in tensors.items()}
            for tensors in (self.atoms, self.means, self.stretches, self.levels)
        )
        return CapturedLayer(self.vectors.to(device), atoms, means, stretches, levels, self.words)

    def spread(self, num_kv_heads: int, shared: bool, layer: int = 0) -> CapturedLayer:
        """The same vectors as those of a layer of `num_kv_heads` heads, each with a copy of a head's dictionary.

        shared: all heads code with the first one's atoms, from one place. layer: copies differ in where they lie only;
        a number says that another copy is wanted.
        """
        T, Hk, D = self.vectors.shape[1:]
        tokens = T * Hk // num_kv_heads
        heads = torch.arange(num_kv_heads) % Hk
        # Head by head, so that a vector stays with its own head's dictionary where the number of heads is a multiple.
        parts = self.vectors.permute(0, 2, 1, 3).reshape(2, Hk, num_kv_heads // Hk, tokens, D)
        vectors = parts.permute(0, 3, 2, 1, 4).reshape(2, tokens, num_kv_heads, D).contiguous()
        atoms = {
            kv: (own[:1] if shared else own[heads % len(own)]).clone() for kv, own in self.atoms.items()
        }  # fmt: skip
        means = {kv: own[heads].clone() for kv, own in self.means.items()}
        stretches = {kv: own[heads].clone() for kv, own in self.stretches.items()}
        return CapturedLayer(vectors, atoms, means, stretches, self.levels, self.words | {"copy": str(layer)})

    def cache(self, sparsity: int, codec: str = "packed16") -> LayerCache:
        """Empty pages for all tokens, page 0 aside."""
        T, Hk, D = self.vectors.shape[1:]
        layout = CodeLayout(D, Hk, sparsity, sparsity, codec, element_bytes=self.vectors.element_size())
        pages, device = 1 + -(-T // layout.block_tokens), self.vectors.device
        codes = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device=device)
        tail = torch.zeros(1, Hk, layout.tail_tokens, 2, D, dtype=self.vectors.dtype, device=device)
        return LayerCache(codes, tail, self.book("key", sparsity), self.book("value", sparsity), layout)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"vectors": self.vectors}
        for kv in KV:
            tensors |= {f"{kv}_atoms": self.atoms[kv], f"{kv}_mean": self.means[kv]}
            tensors |= {f"{kv}_stretch": self.stretches[kv], f"{kv}_levels": self.levels[kv]}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, str(path), metadata=self.words)


def load_vectors(path: Path) -> CapturedLayer:
    """What `CapturedLayer.save` wrote; KeyError or SafetensorError where it did not."""
    with safe_open(str(path), framework="pt") as file:
        tensors, words = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    atoms, means, stretches, levels = (
        {kv: tensors[f"{kv}_{name}"] for kv in KV} for name in ("atoms", "mean", "stretch", "levels")
    )
    return CapturedLayer(tensors["vectors"], atoms, means, stretches, levels, words)


def planted_layer(head_dim: int, count: int, device: str) -> CapturedLayer:
    """`count` vectors of two heads, half of them K: sums of random atoms of falling size and noise.

    For speed with heads of sizes that no captured vectors have; what they say about quality is that coding is right.
    """
    generator = torch.Generator(device).manual_seed(0)
    heads, tokens, few = PLANTED_HEADS, count // (2 * PLANTED_HEADS), head_dim // PLANTED_SHARE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    atoms, vectors = {}, []
    for kv in KV:
        book = torch.nn.functional.normalize(normal(heads, PLANTED_ATOMS, head_dim), dim=-1)
        book[:, 0] = 0
        atoms[kv], rows = book.bfloat16(), PLANTED_NOISE * normal(heads, tokens, head_dim)
        for at in range(few):
            index = torch.randint(1, PLANTED_ATOMS, (heads, tokens), generator=generator, device=device)
            chosen = torch.stack([own[picked] for own, picked in zip(book, index, strict=True)])
            rows += PLANTED_FALL ** (at / few) * normal(heads, tokens, 1) * chosen
        vectors.append(rows.transpose(0, 1).bfloat16())
    zeros, levels = torch.zeros(heads, head_dim, device=device), torch.linspace(-1, 1, 16, device=device)
    return CapturedLayer(
        torch.stack(vectors),
        atoms,
        dict.fromkeys(KV, zeros),
        dict.fromkeys(KV, zeros + 1),
        {kv: levels.repeat(32, 1) for kv in KV},
        {"model": "planted", "layer": "0", "dictionary": "random", "data": "sums of random atoms"},
    )


def capture_vectors(
    model: str, sources: Iterable[Path], dictionary_file: Path, layer: int, count: int, device: str
) -> CapturedLayer:
    """`count` vectors of one layer, half of them K, while the model reads text that training held out.

    model: folder or hub id. sources: text files. dictionary_file: of `vllm-lexico train` for this model.
    """
    from transformers import AutoTokenizer

    from vllm_lexico.dictionary.file import load_dictionary
    from vllm_lexico.dictionary.fingerprint import ModelFingerprint
    from vllm_lexico.train.capture import capture, load_model
    from vllm_lexico.train.texts import TextSequences

    dictionary = load_dictionary(dictionary_file)
    loaded = load_model(model, device, "auto")
    shape = ModelFingerprint.of(loaded.config.get_text_config())
    dictionary.check(shape, model)
    names = [str(source) for source in sources]
    texts = TextSequences(names, AutoTokenizer.from_pretrained(model), SEQUENCE_TOKENS, seed=0)
    tokens = count // (2 * shape.num_kv_heads)
    sequences = texts.take(-(-tokens // KEPT_TOKENS), None)
    store = capture(
        loaded, sequences, KEPT_TOKENS, [layer], (shape.num_kv_heads, shape.head_dim), 0, 8 if device != "cpu" else 1
    )
    books = {kv: dictionary.codebook(layer, kv, 15, device=device, dtype=store.dtype) for kv in KV}
    return CapturedLayer(
        store[0, :, :tokens].contiguous(),
        {kv: book.atoms for kv, book in books.items()},
        {kv: book.mean for kv, book in books.items()},
        {kv: book.stretch for kv, book in books.items()},
        {kv: dictionary.tensors[f"{kv}_levels"][layer].to(device) for kv in KV},
        {
            "model": Path(model).name,
            "layer": str(layer),
            "dictionary": dictionary_file.name,
            "data": ", ".join(Path(name).name for name in names),
        },
    )
