"""A dictionary from a model: text, capture, learning layer by layer, one file. An interrupted run can go on."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lexico_kernels.layout import MAX_ATOMS, MAX_SPARSITY, PARTS
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from vllm_lexico.dictionary import (
    ATOM_BITS,
    Dictionary,
    DictionaryInfo,
    ModelFingerprint,
    cache_folder,
    file_name,
    pack_atoms,
    unit_atoms,
)
from vllm_lexico.train.capture import SKIPPED_TOKENS, capture, load_model
from vllm_lexico.train.learn import LearnSettings, learn_atoms
from vllm_lexico.train.levels import energy_lost, learn_levels
from vllm_lexico.train.texts import check_source, sequences_from_files, sequences_from_model

HELD_OUT_SHARE = 0.04  # of the sequences
LEVEL_VECTORS = 4096  # a part and layer, for the levels
REPORTED_SPARSITIES = (7, 15)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the outcome beside the model; checked here, before any work is done.

    data: files or folders, () for text that the model writes itself. vectors: a layer and part, held-out ones included.
    dtype: of the model, "auto" for its own. sequence_tokens: length of the texts read; a quarter of each is kept.
    """

    data: tuple[str, ...] = ()
    learn: LearnSettings = LearnSettings()
    vectors: int = 400_000
    sequence_tokens: int = 2048
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        learn = self.learn
        _check("--atoms", learn.atoms, 2 <= learn.atoms <= MAX_ATOMS, f"2 to {MAX_ATOMS}")
        _check("--atom-bits", learn.atom_bits, learn.atom_bits in ATOM_BITS, f"{ATOM_BITS}")
        _check("--sparsity", learn.sparsity, 1 <= learn.sparsity <= MAX_SPARSITY, f"1 to {MAX_SPARSITY}")
        _check("--epochs", learn.epochs, learn.epochs >= 1, "1 or more")
        _check("--vectors", self.vectors, self.vectors >= 2 * learn.atoms, f"{2 * learn.atoms} or more (2 an atom)")
        _check("--sequence-tokens", self.sequence_tokens, self.sequence_tokens >= 4 * SKIPPED_TOKENS, "64 or more")
        for source in self.data:
            check_source(source)

    @property
    def kept_tokens(self) -> int:
        """Positions of a sequence whose vectors are kept: more different texts are worth more than all of each."""
        return self.sequence_tokens // 4

    def sequences(self, num_kv_heads: int) -> int:
        return max(2, math.ceil(self.vectors / num_kv_heads / self.kept_tokens))


def _check(name: str, given: Any, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {given}; allowed: {allowed}; change it")


def train_dictionary(
    model: str,
    settings: TrainSettings | None = None,
    *,
    name: str | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> Path:
    """Train the dictionary of a transformers model and write it; returns the file's path.

    model: hub id or folder. name: what the dictionary calls its model (default: model). out: the file (default: in the
    user's cache). device: "cuda" or "cpu" (default: cuda when there is one). Finished layers wait in OUT.partial, and
    the same call goes on from them. ValueError on bad settings, an unsuitable model, or a .partial of other settings.
    """
    from transformers import AutoConfig

    settings = settings or TrainSettings()
    device = _checked_device(device)
    name = name or model
    out = out or cache_folder() / file_name(name)
    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(model).get_text_config())
    finished = _Finished(out.with_name(out.name + ".partial"), name, settings, fingerprint)
    missing = finished.missing()
    if missing:
        store, held_out = _capture(model, settings, fingerprint, missing, device)
        _learn_layers(store, held_out, missing, settings, device, finished)
    tensors, errors = finished.collect()
    sequences = settings.sequences(fingerprint.num_kv_heads)
    info = DictionaryInfo(
        model_name=name,
        fingerprint=fingerprint,
        atoms=settings.learn.atoms,
        atom_bits=settings.learn.atom_bits,
        sparsity=settings.learn.sparsity,
        data=", ".join(Path(path).name for path in settings.data) or "text sampled from the model itself",
        tokens_seen=sequences * settings.sequence_tokens,
        vectors_seen=sequences * settings.kept_tokens * fingerprint.num_kv_heads,
        errors=errors,
        version=_version(),
        seed=settings.seed,
    )
    Dictionary(info, tensors).save(out)
    shutil.rmtree(finished.folder)
    return out


def _checked_device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check("--device", device, device == "cpu" or device.startswith("cuda"), "cpu, cuda, cuda:1 and so on")
    _check("--device", device, device == "cpu" or torch.cuda.is_available(), "cpu, as PyTorch sees no GPU here")
    return device


def _capture(
    model: str, settings: TrainSettings, fingerprint: ModelFingerprint, layers: list[int], device: str
) -> tuple[torch.Tensor, int]:
    """(K and V [layers, 2, tokens, Hk, D], how many of the tokens, the last ones, are held out)."""
    started = time.monotonic()
    count = settings.sequences(fingerprint.num_kv_heads)
    loaded = load_model(model, device, settings.dtype)
    on_gpu = loaded.device.type == "cuda"
    if settings.data:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        sources = [Path(path) for path in settings.data]
        sequences = sequences_from_files(sources, tokenizer, settings.sequence_tokens, count, settings.seed)
    else:
        batch = 128 if on_gpu else 8
        sequences = sequences_from_model(loaded, settings.sequence_tokens, count, settings.seed, batch)
    shape = (fingerprint.num_kv_heads, fingerprint.head_dim)
    kept = settings.kept_tokens
    store = capture(loaded, sequences, kept, layers, shape, settings.seed, batch=8 if on_gpu else 1)
    tqdm.write(f"captured {store.shape[2]} tokens of {count} sequences in {time.monotonic() - started:.0f} s")
    return store, kept * max(1, math.ceil(HELD_OUT_SHARE * count))


def _learn_layers(
    store: torch.Tensor, held_out: int, layers: list[int], settings: TrainSettings, device: str, finished: "_Finished"
) -> None:
    """Learn the layers a few at a time and put each into the folder of finished ones."""
    learn, tokens = settings.learn, store.shape[2] - held_out
    vectors = tokens * store.shape[3]
    at_once = 4 if device.startswith("cuda") else 1  # layers, K and V each: enough rows a kernel to keep a GPU busy
    started = time.monotonic()
    steps_a_layer = learn.epochs * learn.steps_per_epoch(vectors)
    products = 2 * min(learn.batch, vectors) * (learn.sparsity + 1)  # passes and the gradient, for K and V, a step
    flops_a_layer = steps_a_layer * products * 2 * learn.atoms * store.shape[4]
    with tqdm(total=len(layers) * steps_a_layer, desc="learning", unit="step", mininterval=1.0) as progress:
        for first in range(0, len(layers), at_once):
            group = layers[first : first + at_once]
            part = store[first : first + len(group)].to(device)
            on_step = partial(progress.update, len(group))
            tensors, errors = _learn_group(part, held_out, settings, group[0], on_step)
            for row, layer in enumerate(group):
                finished.put(layer, {name: tensor[row] for name, tensor in tensors.items()}, errors[row])
                progress.write(f"layer {layer:3d}  energy lost  {_error_words(errors[row])}")
    seconds = time.monotonic() - started
    rate = len(layers) * flops_a_layer / seconds / 1e12
    tqdm.write(f"{len(layers)} layers in {seconds:.0f} s; correlations and gradients alone ran at {rate:.1f} TFLOP/s")


def _learn_group(
    captured: torch.Tensor, held_out: int, settings: TrainSettings, seed_offset: int, on_step: Callable[..., object]
) -> tuple[dict[str, torch.Tensor], list[dict[str, dict[str, float]]]]:
    """Dictionaries of some layers: file tensors by name, and for each layer errors by part and sparsity.

    captured: [layers, 2, tokens, Hk, D]; the last held_out tokens only measure.
    """
    layers, parts, tokens, heads, dim = captured.shape
    vectors = captured.reshape(layers * parts, tokens, heads, dim).float()
    mean = vectors[:, :-held_out].mean(1)
    vectors = vectors - mean[:, None]
    train, test = vectors[:, :-held_out].flatten(1, 2), vectors[:, -held_out:].flatten(1, 2)
    integers = learn_atoms(train, settings.learn, settings.seed + seed_offset, on_step)
    atoms = unit_atoms(integers)
    stride = max(1, train.shape[1] // LEVEL_VECTORS)
    levels = learn_levels(train[:, ::stride], atoms)
    sparsities = sorted({settings.learn.sparsity, *REPORTED_SPARSITIES})
    lost = energy_lost(test, atoms, levels, sparsities)
    packed = pack_atoms(integers, settings.learn.atom_bits)
    results = {}
    for at, part in enumerate(PARTS):
        for kind, tensor in (("atoms", packed), ("mean", mean), ("levels", levels)):
            results[f"{part}_{kind}"] = tensor[at::parts].cpu()
    by_sparsity = {str(sparsity): lost[sparsity].view(layers, parts).tolist() for sparsity in sparsities}
    errors = [
        {part: {s: round(values[row][at], 5) for s, values in by_sparsity.items()} for at, part in enumerate(PARTS)}
        for row in range(layers)
    ]
    return results, errors


def _error_words(errors: dict[str, dict[str, float]]) -> str:
    return "  ".join(
        f"{part} " + " ".join(f"s={sparsity} {lost:.4f}" for sparsity, lost in of_part.items())
        for part, of_part in errors.items()
    )


class _Finished:
    """The folder beside the output that holds finished layers until all are there."""

    def __init__(self, folder: Path, name: str, settings: TrainSettings, fingerprint: ModelFingerprint) -> None:
        self.folder, self.num_layers = folder, fingerprint.num_layers
        wanted = json.dumps({"model": name, "fingerprint": asdict(fingerprint)} | asdict(settings), indent=1)
        note = folder / "settings.json"
        if note.exists() and note.read_text() != wanted:
            raise ValueError(
                f"{folder} holds layers of a run with other settings; delete it or repeat that run: {note}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(wanted)

    def _files(self, layer: int) -> tuple[Path, Path]:
        return self.folder / f"layer_{layer:03d}.safetensors", self.folder / f"layer_{layer:03d}.json"

    def missing(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if not self._files(layer)[1].exists()]

    def put(self, layer: int, tensors: dict[str, torch.Tensor], errors: dict[str, dict[str, float]]) -> None:
        """The JSON file is written last: it says that the layer is complete."""
        data, note = self._files(layer)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(data))
        note.write_text(json.dumps(errors))

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, list[float]]]]:
        layers = [load_file(str(self._files(layer)[0])) for layer in range(self.num_layers)]
        notes = [json.loads(self._files(layer)[1].read_text()) for layer in range(self.num_layers)]
        tensors = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        errors = {part: {s: [note[part][s] for note in notes] for s in notes[0][part]} for part in PARTS}
        return tensors, errors


def _version() -> str:
    """The release, and the commit when this is a source checkout."""
    try:
        release = metadata.version("vllm-lexico")
    except metadata.PackageNotFoundError:
        release = "source"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return release
    return f"{release} ({commit})"
