"""What a dictionary file says of itself: strings in the metadata of the safetensors file."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lexico_kernels.memory.layout import KV, MAX_ATOMS, MAX_SPARSITY

from vllm_lexico.dictionary.atoms import ATOM_BITS
from vllm_lexico.dictionary.fingerprint import LAYERS, ModelFingerprint
from vllm_lexico.dictionary.names import check_name, printable
from vllm_lexico.errors import check_whole_number, either, refusal, shown

FORMAT = "lexico-dictionary"
FORMAT_VERSION = "3"  # what is written: its checksum covers metadata, names, types, shapes and bytes
SOME_LAYERS_VERSION = "4"  # the same, where not all layers are coded; its metadata has the list of those that are
READ_VERSIONS = ("2", FORMAT_VERSION, SOME_LAYERS_VERSION)  # the checksum of version 2 covers names and bytes
REMEDY = "fetch it again, or make one with `vllm-lexico train MODEL`"
MOST_LOST = 10  # of a vector's energy; more than any code that anybody would keep
_CHANGE = "change it"


@dataclass(frozen=True)
class DictionaryInfo:
    """What a dictionary says of itself; a value that cannot be right is a ValueError."""

    model_name: str
    fingerprint: ModelFingerprint
    atoms: int  # N, with the null atom
    atom_bits: int
    sparsity: int  # atoms per vector in training
    data: str  # what it was trained on, in words
    tokens_seen: int
    vectors_seen: int  # per layer, of keys and of values each
    errors: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # kv -> sparsity -> energy lost by layer
    version: str = "unknown"  # commit or release that trained it
    seed: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)  # how it came about, in JSON; files of before have none

    def __post_init__(self) -> None:
        check_name(self.model_name)
        check_whole_number("atoms", self.atoms, 2, MAX_ATOMS, _CHANGE)
        if type(self.atom_bits) is not int or self.atom_bits not in ATOM_BITS:
            raise ValueError(refusal("atom_bits", self.atom_bits, either(ATOM_BITS), _CHANGE))
        check_whole_number("sparsity", self.sparsity, 1, MAX_SPARSITY, _CHANGE)
        check_whole_number("tokens_seen", self.tokens_seen, 0, 2**63, _CHANGE)
        check_whole_number("vectors_seen", self.vectors_seen, 0, 2**63, _CHANGE)
        check_whole_number("seed", self.seed, -(2**64), 2**64, _CHANGE)
        self._check_errors()
        if not isinstance(self.recipe, dict):
            raise ValueError(refusal("recipe", self.recipe, "a JSON object", _CHANGE))

    def _check_errors(self) -> None:
        coded = len(self.fingerprint.layers)
        allowed = f"a list of {coded} numbers from 0 to {MOST_LOST}, by key or value and sparsity"
        sparsities = {str(sparsity) for sparsity in range(1, MAX_SPARSITY + 1)}
        known = isinstance(self.errors, dict) and set(self.errors) <= set(KV)
        for of_kv in self.errors.values() if known else ():
            known = known and isinstance(of_kv, dict) and set(of_kv) <= sparsities
            for lost in of_kv.values() if known else ():
                known = known and isinstance(lost, list) and len(lost) == coded
                known = known and all(type(share) in (float, int) and 0 <= share <= MOST_LOST for share in lost)
        if not known:
            raise ValueError(refusal("errors", self.errors, allowed, _CHANGE))

    def recipe_words(self) -> list[tuple[str, str]]:
        """How it came about: name and words of each thing that `recipe` holds."""
        return [(printable(name.replace("_", " ")), printable(_words(value))) for name, value in self.recipe.items()]

    def to_metadata(self) -> dict[str, str]:
        """Strings from which `from_metadata` makes the same."""
        facts = asdict(self) | {"fingerprint": self.fingerprint.to_json()}
        version = FORMAT_VERSION
        if LAYERS in facts["fingerprint"]:
            facts[LAYERS], version = facts["fingerprint"].pop(LAYERS), SOME_LAYERS_VERSION
        if not self.recipe:  # files of before have none
            del facts["recipe"]
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        return {"format": FORMAT, "format_version": version} | values

    @staticmethod
    def from_metadata(metadata: dict[str, str] | None, path: Path) -> "DictionaryInfo":
        """Read the metadata of the file `path`.

        Raises:
            ValueError: it is no dictionary, one of another format version, or has values that cannot be right.
        """
        if not metadata or metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file but not a Lexico dictionary; {REMEDY}")
        if metadata.get("format_version") not in READ_VERSIONS:
            raise ValueError(
                f"{path} has dictionary format version {shown(metadata.get('format_version'))}, this release reads "
                f"{either(READ_VERSIONS)}; install the release that wrote the file or train the dictionary again"
            )
        known = [f for f in fields(DictionaryInfo) if f.name in metadata or f.name != "recipe"]
        absent = [f.name for f in known if f.name not in metadata]
        if absent:
            raise ValueError(f"{path} is damaged: its metadata lacks {', '.join(absent)}; {REMEDY}")
        try:
            values: dict[str, Any] = {}
            for f in known:
                values[f.name] = metadata[f.name] if f.type is str else json.loads(metadata[f.name])
            layers = json.loads(metadata[LAYERS]) if LAYERS in metadata else None
            values["fingerprint"] = _fingerprint(values["fingerprint"], layers)
            return DictionaryInfo(**values)
        except (ValueError, RecursionError) as error:  # ValueError: also JSON, and numbers of thousands of digits
            raise ValueError(f"{path} is damaged: its metadata cannot be right ({error}); {REMEDY}") from error


def _words(value: Any) -> str:
    """A value of JSON on one line: "writer vLLM 0.33, tokens (chat 90,000, code 80,000)"."""
    if isinstance(value, dict):
        parts = (f"({_words(part)})" if isinstance(part, dict) else _words(part) for part in value.values())
        return ", ".join(f"{key.replace('_', ' ')} {part}" for key, part in zip(value, parts, strict=True))
    return f"{value:,}" if type(value) is int and value > 9999 else str(value)


def _fingerprint(given: Any, layers: Any) -> ModelFingerprint:
    """From what metadata holds; layers: None where all are coded."""
    names = [f.name for f in fields(ModelFingerprint) if f.name != "some_layers"]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise ValueError(refusal("fingerprint", given, f"an object of {', '.join(names)}", _CHANGE))
    if layers is None:
        return ModelFingerprint(**given)
    if not isinstance(layers, list) or not layers:
        raise ValueError(refusal("the coded layers", layers, "a list of numbers", _CHANGE))
    return ModelFingerprint(**given, some_layers=tuple(layers))
