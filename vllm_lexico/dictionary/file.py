"""The dictionary of a model: what is in the file, and how it is read and written.

A dictionary file is one safetensors file:

======================== ========================== ============ =====================================================
tensor                   shape                      dtype        meaning
======================== ========================== ============ =====================================================
key_atoms, value_atoms   [layers, Hk, N, D or D/2]  int8, uint8  atoms as small integers; 4 bits: two in a byte
key_mean, value_mean     [layers, Hk, D]            float32      taken off a head's vectors before they are coded
key_stretch, ..          [layers, Hk, D]            float32      then they are divided by this, number by number
key_levels, value_levels [layers, 32, 16]           float32      coefficient levels; row s serves sparsity s
key_usage, value_usage   [layers, Hk, N]             float16      optional; share of all chosen atoms that are this one
======================== ========================== ============ =====================================================

Each KV head has atoms of its own, or all of a layer share them; then the axis Hk is missing.
An atom is scaled to unit length when it is loaded, so that no scale is stored. Atom 0 is the null atom: zeros. Usage is
only there to be looked at; a layer's row of it sums to 1.
Everything else (fingerprint, data, errors) is strings in the safetensors metadata, see `DictionaryInfo`.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, MAX_SPARSITY, NUM_LEVELS
from safetensors import SafetensorError, safe_open

from vllm_lexico.dictionary.names import same_model, train_command
from vllm_lexico.files import save_tensors

logger = logging.getLogger("vllm.lexico")

FORMAT_VERSION = "2"
ATOM_BITS = (4, 8)
# `Codebook.gain`. Attention is an average of values, in which errors of many tokens cancel and what every code lacks of
# its length does not: 1 takes it back. A score goes through an exponential, where errors do not cancel and a longer
# key has larger ones: on text, attention is nearest to that of raw keys between 1/4 and 1/2, and retrieval from long
# texts wants more than that (docs/log.md).
GAINS = {"key": 0.5, "value": 1.0}


@dataclass(frozen=True)
class ModelFingerprint:
    """What has to agree between a model and a dictionary before the codes can mean anything."""

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rope: str  # canonical JSON of the rotary embedding's base and scaling

    @staticmethod
    def of(config: Any) -> "ModelFingerprint":
        """Fingerprint of a transformers text config (4.x or 5.x, or the same as vLLM holds it)."""
        heads = config.num_attention_heads
        return ModelFingerprint(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            rope=_canonical_rope(config),
        )

    def differences(self, model: "ModelFingerprint") -> list[str]:
        """Fields in which this fingerprint (a dictionary's) is not that of `model`, in words; empty if none."""
        pairs = ((f.name, getattr(self, f.name), getattr(model, f.name)) for f in fields(self))
        return [f"{name}: {own} in the dictionary, {given} in the model" for name, own, given in pairs if own != given]


def _canonical_rope(config: Any) -> str:
    """Rotary settings as JSON that is equal for equal rotations, whichever transformers wrote the config.

    transformers 5 keeps everything in `rope_parameters` (nested by layer type in some models), 4 keeps `rope_theta` and
    `rope_scaling`; either may leave a default out, name it `type`, or spell 10000 as an integer.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)
    partial = getattr(config, "partial_rotary_factor", None)

    def canonical(settings: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in settings.items() if value is not None}
        legacy = known.pop("type", None)
        known.setdefault("rope_type", legacy or "default")
        if theta is not None:
            known.setdefault("rope_theta", theta)
        if partial is not None:
            known.setdefault("partial_rotary_factor", partial)
        if known.get("partial_rotary_factor") == 1.0:
            known.pop("partial_rotary_factor")
        return {name: _as_float(value) for name, value in known.items()}

    if parameters and all(isinstance(value, dict) or value is None for value in parameters.values()):
        rope = {name: canonical(value) for name, value in parameters.items() if value is not None}
    else:
        rope = canonical(parameters)
    return json.dumps(rope, sort_keys=True)


def _as_float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_float(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True)
class DictionaryInfo:
    """What a dictionary file says about itself; stored as strings in the metadata of the file."""

    model_name: str
    fingerprint: ModelFingerprint
    atoms: int  # N, with the null atom
    atom_bits: int
    sparsity: int  # atoms a vector in training
    data: str  # what it was trained on, in words
    tokens_seen: int
    vectors_seen: int  # a layer and part
    errors: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # part -> sparsity -> energy lost by layer
    version: str = "unknown"  # commit or release that trained it
    seed: int = 0

    def to_metadata(self) -> dict[str, str]:
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in asdict(self).items()}
        return {"format": "lexico-dictionary", "format_version": FORMAT_VERSION} | values

    @staticmethod
    def from_metadata(metadata: dict[str, str] | None, path: Path) -> "DictionaryInfo":
        """Parse; ValueError (given, allowed, remedy) when it is no dictionary or one of another format."""
        if not metadata or metadata.get("format") != "lexico-dictionary":
            raise ValueError(f"{path} is a safetensors file but not a Lexico dictionary; {_REMEDY}")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has dictionary format version {metadata.get('format_version')!r}, this release reads version "
                f"{FORMAT_VERSION!r}; install the release that wrote the file or train the dictionary again"
            )
        try:
            values: dict[str, Any] = {}
            for f in fields(DictionaryInfo):
                values[f.name] = metadata[f.name] if f.type is str else json.loads(metadata[f.name])
            values["fingerprint"] = ModelFingerprint(**values["fingerprint"])
            return DictionaryInfo(**values)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: its metadata cannot be read ({error}); {_REMEDY}") from error


_REMEDY = "fetch it again, or make one with `vllm-lexico train MODEL`"


def pack_atoms(integers: torch.Tensor, atom_bits: int) -> torch.Tensor:
    """int8 [..., D] as the file holds it: the same for 8 bits; uint8 [..., D/2] for 4, even index in the low half."""
    if atom_bits == 8:
        return integers.to(torch.int8).contiguous()
    halves = integers.to(torch.int16) & 0xF
    return (halves[..., 0::2] | halves[..., 1::2] << 4).to(torch.uint8)


def unpack_atoms(stored: torch.Tensor, atom_bits: int) -> torch.Tensor:
    """Inverse of `pack_atoms`: int8 [..., D]."""
    if atom_bits == 8:
        return stored
    halves = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


def unit_atoms(integers: torch.Tensor) -> torch.Tensor:
    """Integers [..., N, D] -> float32 rows of unit length; a row of zeros (the null atom) stays zeros."""
    return torch.nn.functional.normalize(integers.float(), dim=-1)


@dataclass(frozen=True)
class Dictionary:
    """A model's dictionary in memory: the tensors as the file holds them (see the module) and what it says."""

    info: DictionaryInfo
    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        print_, info = self.info.fingerprint, self.info
        if info.atom_bits not in ATOM_BITS:
            raise ValueError(f"atom_bits is {info.atom_bits}, allowed are {ATOM_BITS}; {_REMEDY}")
        heads = () if self.shared else (print_.num_kv_heads,)
        atoms = (print_.num_layers, *heads, info.atoms, print_.head_dim * info.atom_bits // 8)
        rows = (print_.num_layers, print_.num_kv_heads, print_.head_dim)
        levels = (print_.num_layers, MAX_SPARSITY + 1, NUM_LEVELS)
        shapes = {"atoms": atoms, "mean": rows, "stretch": rows, "levels": levels}
        for name, shape in ((f"{kv}_{kind}", shape) for kv in KV for kind, shape in shapes.items()):
            given = tuple(self.tensors[name].shape) if name in self.tensors else "absent"
            if given != shape:
                raise ValueError(f"the dictionary's tensor {name} is {given}, its metadata asks for {shape}; {_REMEDY}")
        for kv in KV:
            usage, wanted = self.tensors.get(f"{kv}_usage"), atoms[:-1]
            if usage is not None and (usage.dtype != torch.float16 or tuple(usage.shape) != wanted):
                raise ValueError(
                    f"the dictionary's tensor {kv}_usage is {usage.dtype} {tuple(usage.shape)}, its metadata "
                    f"asks for float16 {wanted}; {_REMEDY}"
                )

    @property
    def shared(self) -> bool:
        """Whether all KV heads of a layer share their atoms."""
        return self.tensors["key_atoms"].ndim == 3 if "key_atoms" in self.tensors else True

    def usage(self, kv: str) -> torch.Tensor | None:
        """float32 [layers, 1 + H (N - 1)]: share of all chosen atoms that are this one; None where the file is silent.

        The null atom comes first, then the atoms of all H dictionaries of a layer. part: "key" or "value".
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
        heads: slice | None = None,
    ) -> Codebook:
        """What codes and decodes one part of one layer.

        part: "key" or "value". sparsity: 1..31, picks the levels. dtype: of the atoms. heads: this rank's KV heads.
        """
        stored = self.tensors[f"{kv}_atoms"][layer]
        own = stored if self.shared else stored[heads or slice(None)]
        integers = unpack_atoms(own.to(device), self.info.atom_bits)
        mean, stretch = (self.tensors[f"{kv}_{kind}"][layer, heads or slice(None)] for kind in ("mean", "stretch"))
        levels = self.tensors[f"{kv}_levels"][layer, sparsity]
        return Codebook(
            atoms=unit_atoms(integers).to(dtype).contiguous(),
            levels=levels.to(device, torch.float32),
            mean=mean.to(device, torch.float32).contiguous(),
            stretch=stretch.to(device, torch.float32).contiguous(),
            gain=GAINS[kv],
        )

    def check(self, fingerprint: ModelFingerprint, model_name: str) -> None:
        """Raise ValueError when it was made for another kind of model; log a warning when only the name differs."""
        differences = self.info.fingerprint.differences(fingerprint)
        if differences:
            raise ValueError(
                f"the dictionary of {self.info.model_name} does not fit {model_name}: {'; '.join(differences)}. "
                f"Name a dictionary of this model, or make one: {train_command(model_name)}"
            )
        if not same_model(self.info.model_name, model_name):
            logger.warning(
                "the dictionary was trained on %s, the model is %s: same shape, so it works, but one of its own "
                "loses less: %s",
                self.info.model_name,
                model_name,
                train_command(model_name),
            )

    def save(self, path: Path) -> None:
        """Write the file whole or not at all. float tensors keep their dtype."""
        save_tensors(path, self.tensors, self.info.to_metadata() | {"sha256": _checksum(self.tensors)})


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_info(path: Path) -> DictionaryInfo:
    """What the file says of itself; reads its header only. Errors as `load_dictionary`."""
    return DictionaryInfo.from_metadata(_open(path, lambda file: file.metadata()), path)


def load_dictionary(path: Path | str) -> Dictionary:
    """Read a dictionary file; ValueError when it is absent, cut short, damaged, no dictionary or of another format."""
    path = Path(path)
    info = read_info(path)
    tensors = _open(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if _open(path, lambda file: file.metadata()).get("sha256") != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match its tensors; {_REMEDY}")
    try:
        return Dictionary(info, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open(path: Path, read: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no dictionary file {path}; {_REMEDY}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, cut short or no safetensors file ({error}); {_REMEDY}") from error
