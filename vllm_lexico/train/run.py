"""A dictionary from a model: rounds of reading text and learning from it, then one file.

A round captures as many vectors as memory is set aside for, learns from them and lets them go; so memory does not grow
with the amount of text. After a round its state is kept: an interrupted run goes on from there. The last half of the
rounds anneals: the step falls to nothing, and codes are the stored ones.
"""

import json
import math
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lexico_kernels.files import cache_folder
from lexico_kernels.memory.layout import KV, MAX_ATOMS, MAX_SPARSITY
from safetensors.torch import load_file
from tqdm.auto import tqdm

from vllm_lexico.dictionary.atoms import ATOM_BITS
from vllm_lexico.dictionary.file import Dictionary, check_out
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.names import file_name, plain_name
from vllm_lexico.train.capture import SKIPPED_TOKENS, capture, load_model
from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.texts import TextSequences, check_source, sequences_from_model

ROUND_BYTES = {"cuda": 12 << 30, "cpu": 1 << 30}  # of vectors held at once, by kind of device
HELD_OUT_TOKENS = 8192  # positions kept, of texts that are not trained on
LEAST_GAIN = 0.003  # of the error, from round to round; with less annealing begins
FURTHEST_TOKENS = 32768  # where in a context text is read, if the model goes so far


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the outcome beside the model; checked here, before any work is done.

    data: files, folders or Hugging Face datasets, () for text that the model writes itself. vectors: different ones a
    layer and part. passes: how often each is learned from. rounds: at most so many, or more where memory asks for it.
    sequence_tokens: length of the texts read, None for 2048 from data and 1024 from the model, which writes many short
    texts in the time of a few long ones. dtype: of the model, "auto" for its own.
    """

    data: tuple[str, ...] = ()
    learn: LearnSettings = LearnSettings()
    vectors: int = 2_000_000
    passes: int = 8
    rounds: int = 4
    sequence_tokens: int | None = None
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        learn = self.learn
        _check("--atoms", learn.atoms, 2 <= learn.atoms <= MAX_ATOMS, f"2 to {MAX_ATOMS}")
        _check("--atom-bits", learn.atom_bits, learn.atom_bits in ATOM_BITS, f"{ATOM_BITS}")
        _check("--sparsity", learn.sparsity, 1 <= learn.sparsity <= MAX_SPARSITY, f"1 to {MAX_SPARSITY}")
        _check("--key-metric", learn.key_metric, 0 <= learn.key_metric <= 1, "0 to 1")
        _check("--passes", self.passes, self.passes >= 1, "1 or more")
        _check("--rounds", self.rounds, self.rounds >= 1, "1 or more")
        _check("--vectors", self.vectors, self.vectors >= 2 * learn.atoms, f"{2 * learn.atoms} or more (2 an atom)")
        _check("--sequence-tokens", self.sequence_tokens, self.length >= 4 * SKIPPED_TOKENS, "64 or more")
        for name in self.data:
            check_source(name)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.sequence_tokens or (2048 if self.data else 1024)

    @property
    def kept_tokens(self) -> int:
        """Positions of a sequence whose vectors are kept.

        More different texts are worth more than all of each, but what the model has to write is too dear to leave.
        """
        return self.length // 2 if self.data else self.length - SKIPPED_TOKENS


@dataclass(frozen=True)
class Plan:
    """How the reading is divided. sequences: a round. furthest: see `capture.capture`."""

    rounds: int
    sequences: int
    held_out_sequences: int
    furthest: int

    @property
    def first_annealed(self) -> int:
        """The round with which annealing begins: it takes the last half, where most is gained (docs/log.md)."""
        return self.rounds - max(1, self.rounds // 2)

    def cooling(self, number: int) -> tuple[float, float] | None:
        """Which stretch of annealing a round is; None before it."""
        first, count = self.first_annealed, self.rounds - self.first_annealed
        return None if number < first else ((number - first) / count, (number + 1 - first) / count)

    @staticmethod
    def of(settings: TrainSettings, fingerprint: ModelFingerprint, max_tokens: int, kind: str) -> "Plan":
        """For a device of some kind. max_tokens: the model's longest context."""
        kept, heads = settings.kept_tokens, fingerprint.num_kv_heads
        token_bytes = fingerprint.num_layers * 2 * heads * fingerprint.head_dim * 2
        tokens = math.ceil(settings.vectors / heads)
        rounds = max(settings.rounds, math.ceil(tokens * token_bytes / ROUND_BYTES[kind]))
        sequences = max(1, math.ceil(tokens / rounds / kept))
        held_out = max(1, min(HELD_OUT_TOKENS // kept, math.ceil(sequences / 4)))
        return Plan(rounds, sequences, held_out, min(max_tokens, FURTHEST_TOKENS))


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
    user's cache). device: "cuda" for every GPU that PyTorch sees, which share the layers, "cuda:1" for one, or "cpu"
    (default: cuda when there is one). Finished rounds wait in OUT.partial, and the same call goes on from them.
    ValueError on bad settings, an unsuitable model, or a .partial of other settings.
    """
    from transformers import AutoConfig

    settings = settings or TrainSettings()
    devices = checked_devices(device)
    name = plain_name(name or model)
    out = out or cache_folder() / file_name(name)
    check_out(out, name)
    config = AutoConfig.from_pretrained(model).get_text_config()
    fingerprint = ModelFingerprint.of(config)
    longest = getattr(config, "max_position_embeddings", None) or settings.length
    plan = Plan.of(settings, fingerprint, longest, torch.device(devices[0]).type)
    shares = share_layers(fingerprint.num_layers, devices)
    folder = _partial_folder(out, name, settings, fingerprint, shares)
    job = _Job(model, settings, fingerprint, plan, folder)
    if len(shares) == 1:
        _train_share(0, job, shares)
    else:
        try:
            torch.multiprocessing.spawn(_train_share, (job, shares), nprocs=len(shares))
        except torch.multiprocessing.ProcessRaisedException as error:
            words = str(error).strip().splitlines()[-1]
            if not words.startswith("ValueError: "):
                raise
            raise ValueError(words.removeprefix("ValueError: ")) from error
    tensors, errors, rounds = _collect(folder, shares)
    read = plan.sequences * rounds
    info = DictionaryInfo(
        model_name=name,
        fingerprint=fingerprint,
        atoms=settings.learn.atoms,
        atom_bits=settings.learn.atom_bits,
        sparsity=settings.learn.sparsity,
        data=", ".join(Path(data).name if Path(data).exists() else data for data in settings.data)
        or "text sampled from the model itself",
        tokens_seen=read * settings.length,
        vectors_seen=read * settings.kept_tokens * fingerprint.num_kv_heads,
        errors=errors,
        version=_version(),
        seed=settings.seed,
    )
    Dictionary(info, tensors).save(out)
    shutil.rmtree(folder)
    return out


def checked_devices(device: str | None) -> list[str]:
    """Devices that share the work, for what a user named."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    _check("--device", device, usual, "cpu, cuda, cuda:1 and so on")
    _check("--device", device, device == "cpu" or torch.cuda.is_available(), "cpu, as PyTorch sees no GPU here")
    there = [f"cuda:{at}" for at in range(torch.cuda.device_count())]
    _check("--device", device, device in ("cpu", "cuda", *there), f"cpu, cuda, {', '.join(there)}")
    return there if device == "cuda" else [device]


def share_layers(num_layers: int, devices: list[str]) -> list[tuple[str, list[int]]]:
    """Each device's layers, neighbours together; no more devices than layers."""
    count = min(len(devices), num_layers)
    edges = [at * num_layers // count for at in range(count + 1)]
    return [(devices[at], list(range(edges[at], edges[at + 1]))) for at in range(count)]


@dataclass(frozen=True)
class _Job:
    """What the processes of one run have in common."""

    model: str
    settings: TrainSettings
    fingerprint: ModelFingerprint
    plan: Plan
    folder: Path


def _train_share(rank: int, job: _Job, shares: list[tuple[str, list[int]]]) -> None:
    """Train the layers of one device and leave their part of the file in the folder."""
    device, layers = shares[rank]
    settings, plan, target = job.settings, job.plan, job.folder / f"layers_{layers[0]:03d}"
    if target.with_suffix(".json").exists():
        return
    started = time.monotonic()
    learners = LayerLearners(layers, settings.learn, settings.seed, device)
    state = target.with_suffix(".state")
    done = learners.load(state) if state.exists() else 0
    loaded = load_model(job.model, device, settings.dtype)
    reader = _Reader(loaded, job, layers)
    held_out = reader.read(None, plan.held_out_sequences)
    reading = learning = 0.0
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(reader.sequences, done)
        last = plan.rounds - 1
        number = done
        while number <= last:
            if number < plan.first_annealed and learners.settled(LEAST_GAIN):
                number = plan.first_annealed
                waiting = ahead.submit(reader.sequences, number)
            before = time.monotonic()
            queries = None if learners.learners else reader.no_queries()
            store = reader.read(number, plan.sequences, waiting.result(), queries)
            reading += time.monotonic() - before
            if number < last:
                waiting = ahead.submit(reader.sequences, number + 1)
            learners.learn(
                store, settings.passes, number, cooling=plan.cooling(number), queries=queries, quiet=rank > 0
            )
            lost = learners.held_out(held_out)  # waits for the device
            learning += time.monotonic() - before
            if rank == 0:
                _report(number, plan.rounds, learners, lost, time.monotonic() - started)
            done = number = number + 1
            if done <= last:
                learners.save(state, done)
    learning -= reading
    learners.finish(store, held_out).write(target)
    if rank == 0:
        tokens = store.shape[2] * len(learners.losses)
        codes = tokens * settings.passes * 2 * store.shape[3] * len(layers)
        tqdm.write(f"kept {tokens} tokens in {reading:.1f} s of reading, made {codes} codes in {learning:.1f} s")


class _Reader:
    """Text of every round, and the vectors that the model makes of it."""

    def __init__(self, loaded: Any, job: _Job, layers: list[int]) -> None:
        self.loaded, self.job, self.layers = loaded, job, layers
        self.on_gpu = loaded.device.type == "cuda"
        self.texts: TextSequences | None = None
        settings = job.settings
        if settings.data:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(job.model)
            self.texts = TextSequences(settings.data, tokenizer, settings.length, settings.seed)

    def sequences(self, number: int) -> torch.Tensor | None:
        """A round's text from files, which can be made while the GPU learns; None where the model writes it."""
        return None if self.texts is None else self.texts.take(self.job.plan.sequences, number)

    def no_queries(self) -> torch.Tensor:
        """Zeros to which `read` adds the energy of queries."""
        shape = len(self.layers), self.job.fingerprint.num_kv_heads, self.job.fingerprint.head_dim
        return torch.zeros(shape, device=self.loaded.device)

    def read(
        self,
        number: int | None,
        count: int,
        sequences: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """K and V of a round, or the held-out ones for None: see `capture.capture`."""
        settings, shape = self.job.settings, self.job.fingerprint
        if sequences is None and self.texts is not None:
            sequences = self.texts.take(count, number)
        elif sequences is None:
            seed = settings.seed * 1000 + (999 if number is None else number)
            sequences = sequences_from_model(self.loaded, settings.length, count, seed, 512 if self.on_gpu else 8)
        return capture(
            self.loaded,
            sequences,
            settings.kept_tokens,
            self.layers,
            (shape.num_kv_heads, shape.head_dim),
            settings.seed + (number or 0),
            batch=8 if self.on_gpu else 1,
            furthest=0 if number is None else self.job.plan.furthest,
            queries=queries,
        )


def _report(number: int, rounds: int, learners: LayerLearners, lost: dict[int, torch.Tensor], seconds: float) -> None:
    """Each layer's error after a round."""
    for row, layer in enumerate(learners.layers):
        words = "  ".join(
            f"{kv} " + " ".join(f"s={sparsity} {values[row, at]:.4f}" for sparsity, values in lost.items())
            for at, kv in enumerate(KV)
        )
        tqdm.write(f"round {number + 1}/{rounds}  layer {layer:3d}  energy lost  {words}")
    means = "  ".join(
        f"{kv} " + " ".join(f"s={sparsity} {values[:, at].mean():.4f}" for sparsity, values in lost.items())
        for at, kv in enumerate(KV)
    )
    tqdm.write(f"round {number + 1}/{rounds}  mean       energy lost  {means}  after {seconds:.0f} s")


def _partial_folder(
    out: Path, name: str, settings: TrainSettings, fingerprint: ModelFingerprint, shares: list[tuple[str, list[int]]]
) -> Path:
    """The folder beside the output that holds finished rounds; ValueError where it holds those of another run."""
    folder = out.with_name(out.name + ".partial")
    layers = [share[0] for _, share in shares]
    run = {"model": name, "fingerprint": asdict(fingerprint), "first_layers": layers} | asdict(settings)
    wanted, note = json.dumps(run, indent=1), folder / "settings.json"
    if note.exists() and note.read_text() != wanted:
        raise ValueError(f"{folder} holds rounds of a run with other settings; delete it or repeat that run: {note}")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)
    return folder


def _collect(
    folder: Path, shares: list[tuple[str, list[int]]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, list[float]]], int]:
    """The file's tensors, errors by part and sparsity, and the rounds of the share that took most."""
    paths = [folder / f"layers_{layers[0]:03d}" for _, layers in shares]
    loaded = [load_file(str(path.with_suffix(".safetensors"))) for path in paths]
    notes = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    tensors = {name: torch.cat([kv[name] for kv in loaded]) for name in loaded[0]}
    lost = [note["errors"] for note in notes]
    errors = {kv: {s: [x for own in lost for x in own[kv][s]] for s in lost[0][kv]} for kv in KV}
    return tensors, errors, max(note["rounds"] for note in notes)


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
