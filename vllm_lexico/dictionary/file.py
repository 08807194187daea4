"""The dictionary of a model: what is in the file, and how it is read and written.

A dictionary file is one safetensors file:

======================== ========================== ============ =====================================================
tensor                   shape                      dtype        meaning
======================== ========================== ============ =====================================================
key_atoms, value_atoms   [layers, Hk, N, D or D/2]  int8, uint8  atoms as small integers; 4 bits: two per byte
key_mean, value_mean     [layers, Hk, D]            float32      taken off a head's vectors before they are coded
key_stretch, ..          [layers, Hk, D]            float32      then they are divided by this, number by number
key_levels, value_levels [layers, 32, 16]           float32      coefficient levels; row s serves sparsity s
key_usage, value_usage   [layers, Hk, N]            float16      optional; share of all chosen atoms that are this one
asked_shares             [layers, Hk]               float32      optional; share of a head's tokens that are asked most
======================== ========================== ============ =====================================================

The layers are those that are coded, `coded_layers`, in ascending order: in many models not all of them. Each KV head
has atoms of its own, or all of a layer share them; then the axis Hk is missing.
An atom is scaled to unit length when it is loaded, so that no scale is stored. Atom 0 is the null atom: zeros. Usage is
only there to be looked at; a layer's row of it sums to 1. Asked most are the third of all (layer, head, token) to which
attention is largest when the model repeats a text: shares are 1/3 on average. `tensors.py` has the rules for types and
numbers.
Everything else (fingerprint, data, errors) is strings in the safetensors metadata, see `DictionaryInfo`; so is the
SHA-256 of all the rest of the file, see `_checksum`.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lexico_kernels.memory.codebook import Codebook
from safetensors import safe_open

from vllm_lexico.dictionary.atoms import unit_atoms, unpack_atoms
from vllm_lexico.dictionary.fingerprint import ModelFingerprint, ranges
from vllm_lexico.dictionary.info import REMEDY, DictionaryInfo
from vllm_lexico.dictionary.names import alike, check_name, printable, same_model, train_command
from vllm_lexico.dictionary.tensors import check_numbers, check_types, is_shared
from vllm_lexico.errors import refusal
from vllm_lexico.files import save_tensors

logger = logging.getLogger("vllm.lexico")

# `Codebook.gain`. Attention is an average of values, in which errors of many tokens cancel and what every code lacks of
# its length does not: 1 takes it back. A score goes through an exponential, where errors do not cancel and a longer
# key has larger ones: on text, attention is nearest to that of raw keys between 1/4 and 1/2, and retrieval from long
# texts wants more than that (docs/log.md).
GAINS = {"key": 0.5, "value": 1.0}


@dataclass(frozen=True)
class Dictionary:
    """A model's dictionary in memory: the tensors as the file holds them (see the module) and what it says.

    Types are checked here, numbers when a file is written and when it is read (`save`, `load_dictionary`).
    """

    info: DictionaryInfo
    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        check_types(self.tensors, self.info)

    @property
    def shared(self) -> bool:
        """Whether all KV heads of a layer share their atoms."""
        return is_shared(self.tensors)

    def usage(self, kv: str) -> torch.Tensor | None:
        """Share of all chosen atoms that are this one: float32 [coded layers, 1 + H (N - 1)]; None where it is unknown.

        The null atom comes first, then the atoms of all H dictionaries of a layer. kv: "key" or "value".
        """
        kept = self.tensors.get(f"{kv}_usage")
        if kept is None:
            return None
        rows = kept.float().view(kept.shape[0], -1, kept.shape[-1])
        return torch.cat((rows[:, 0, :1], rows[:, :, 1:].flatten(1)), 1)

    def codebook(
        self,
        layer: int,
        kv: str,
        sparsity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        heads: Sequence[int] | None = None,
    ) -> Codebook:
        """What codes and decodes the keys or the values of one layer.

        Args:
            layer: the model's number of it, as in vLLM's layer names.
            kv: "key" or "value".
            sparsity: 1..31, picks the levels.
            device: where it goes.
            dtype: of the atoms.
            heads: KV heads of the model, in the order wanted; None for all.

        Raises:
            ValueError: the dictionary does not code this layer.
        """
        row = self._row(layer)
        stored = self.tensors[f"{kv}_atoms"][row]
        chosen = slice(None) if heads is None else list(heads)
        own = stored if self.shared else stored[chosen]
        integers = unpack_atoms(own.to(device), self.info.atom_bits)
        mean, stretch = (self.tensors[f"{kv}_{kind}"][row, chosen] for kind in ("mean", "stretch"))
        levels = self.tensors[f"{kv}_levels"][row, sparsity]
        return Codebook(
            atoms=unit_atoms(integers).to(dtype).contiguous(),
            levels=levels.to(device, torch.float32),
            mean=mean.to(device, torch.float32).contiguous(),
            stretch=stretch.to(device, torch.float32).contiguous(),
            gain=GAINS[kv],
        )

    def _row(self, layer: int) -> int:
        """A layer's place in the tensors."""
        layers = self.info.fingerprint.layers
        if layer not in layers:
            remedy = f"make one that does: {train_command(self.info.model_name)}"
            raise ValueError(
                refusal(f"a layer of the dictionary of {self.info.model_name}", layer, ranges(layers), remedy)
            )
        return layers.index(layer)

    def check(self, fingerprint: ModelFingerprint, model_name: str, overrides: str | None = "") -> None:
        """Check that it can serve a model; say it in one line of the log when it was trained on another one.

        overrides: of the model's configuration, see `train_command`.

        Raises:
            ValueError: it was made for another kind of model.
        """
        own, name = self.info.model_name, printable(model_name)
        differences = self.info.fingerprint.differences(fingerprint)
        command = train_command(model_name, overrides, fingerprint.short_context)
        if differences:
            raise ValueError(
                f"the dictionary of {own} does not fit {name}: {'; '.join(differences)}. "
                f"Name a dictionary of this model, or make one: {command}"
            )
        if same_model(own, model_name):
            return
        if alike(own, model_name):
            words = "their names end alike, shape and rotary embedding agree; if it is another's, its own loses less"
        else:
            words = "shape and rotary embedding agree, as with fine-tunes and quantized twins; its own would lose less"
        logger.info("the dictionary of %s serves %s: %s (%s)", own, name, words, command)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            ValueError: a number cannot be right, as after a training that overflowed, or `path` is no file.
            OSError: the file cannot be written.
        """
        check_numbers(self.tensors, self.info.atom_bits, self.info.fingerprint.layers)
        metadata = self.info.to_metadata()
        save_tensors(path, self.tensors, metadata | {"sha256": _checksum(self.tensors, metadata)})


def read_info(path: Path) -> DictionaryInfo:
    """What the file says of itself; reads its header only. Errors as `load_dictionary`."""
    return DictionaryInfo.from_metadata(_read(path, with_tensors=False)[0], path)


def read_checksum(path: Path) -> str:
    """The hash by which a file is known: hexadecimal SHA-256, from its header. Errors as `load_dictionary`."""
    return _read(path, with_tensors=False)[0].get("sha256", "")


def load_dictionary(path: Path | str) -> Dictionary:
    """Read a dictionary file.

    Raises:
        ValueError: it is absent, cut short, damaged, no dictionary, of another format version, or has numbers that
            cannot be right.
    """
    path = Path(path)
    metadata, tensors = _read(path, with_tensors=True)
    info = DictionaryInfo.from_metadata(metadata, path)
    if metadata.get("sha256") != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not match what it holds; {REMEDY}")
    try:
        dictionary = Dictionary(info, tensors)
        check_numbers(tensors, info.atom_bits, info.fingerprint.layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dictionary


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata, and of each tensor's name, dtype, shape and bytes; of names and bytes alone in version 2."""
    digest = hashlib.sha256()
    whole = metadata["format_version"] != "2"
    if whole:
        digest.update(
            json.dumps({name: words for name, words in metadata.items() if name != "sha256"}, sort_keys=True).encode()
        )
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update((json.dumps([name, str(tensor.dtype), tensor.shape]) if whole else name).encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and, if asked for, tensors of a safetensors file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder and no dictionary file; name a file in it that ends with .safetensors")
    if not path.is_file():
        raise ValueError(f"there is no dictionary file {path}; {REMEDY}")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except Exception as error:  # whatever the parser or torch say of a file that is none
        raise ValueError(f"{path} is damaged, cut short or no safetensors file ({error}); {REMEDY}") from error


def check_out(path: Path, model_name: str) -> None:
    """Check, before any work is done, that the dictionary of a model may be written to a file.

    Raises:
        ValueError: no model can be called that, `path` cannot be a dictionary file or would be taken for weights, or
            what stands there is not an earlier dictionary of the same model.
    """
    check_name(model_name)
    remedy = "give the name of a file, as in my-dictionary.safetensors"
    if path.suffix == ".png":  # the picture's name
        raise ValueError(refusal("the file to write", str(path), "any suffix but .png", remedy))
    if path.exists() and not path.is_file():
        raise ValueError(f"the file to write, {path}, is there and no file; {remedy}")
    if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        raise ValueError(
            f"the file to write, {path}, would lie beside a model's config.json, where vLLM takes every .safetensors "
            f"for weights; name another folder, or another suffix, as in {path.with_suffix('.lexico')}"
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"the file to write, {path}, cannot be: {folder} is no folder; {remedy}")
    if not path.exists():
        return
    try:
        own = read_info(path).model_name
    except ValueError as error:
        raise ValueError(
            f"{path} is there and would be replaced, but: {error}; move it away or name another file"
        ) from error
    if not same_model(own, model_name):
        raise ValueError(
            f"{path} is the dictionary of {own} and would be replaced by that of {model_name}; move it away or name "
            f"another file"
        )
