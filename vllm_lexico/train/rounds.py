"""The rounds of one device: its layers learn from what the model reads, until their part of the file is done."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from lexico_kernels.memory.layout import KV
from tqdm.auto import tqdm

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.layer_learners import FinishedLayers, LayerLearners
from vllm_lexico.train.settings import Plan, TrainSettings
from vllm_lexico.train.state import Kept, RunFolder
from vllm_lexico.train.texts import TextSequences, sequences_from_model

LEAST_GAIN = 0.003  # of the error, from round to round; with less annealing begins
SEQUENCES_WRITTEN = {"cuda": 512, "cpu": 8}  # at once, by kind of device
SEQUENCES_READ = {"cuda": 8, "cpu": 1}


@dataclass(frozen=True)
class Job:
    """What the processes of one run have in common.

    Args:
        model: hub id or folder.
        settings: what the user asked for.
        fingerprint: of the model.
        plan: how the reading is divided.
        run: where state is kept.
    """

    model: str
    settings: TrainSettings
    fingerprint: ModelFingerprint
    plan: Plan
    run: RunFolder


@lru_cache(1)
def texts_of(model: str, settings: TrainSettings) -> TextSequences:
    """The text of a run with data; read once per process. ValueError when it cannot be read."""
    from transformers import AutoTokenizer

    return TextSequences(settings.data, AutoTokenizer.from_pretrained(model), settings.length, settings.seed)


def finished_layers(run: RunFolder, layers: list[int]) -> FinishedLayers | None:
    """What some layers add to the file, if they are done."""
    kept = run.load(_finished_name(layers))
    return None if kept is None else FinishedLayers(kept.tensors, **kept.facts)


def _finished_name(layers: list[int]) -> str:
    return f"layers_{layers[0]:03d}_finished"


def _rounds_name(layers: list[int]) -> str:
    return f"layers_{layers[0]:03d}_rounds"


def train_share(rank: int, job: Job, shares: list[tuple[str, list[int]]]) -> None:
    """Train the layers of one device and leave their part of the file in the run's folder."""
    device, layers = shares[rank]
    if finished_layers(job.run, layers) is None:
        _Share(job, layers, device, rank).train()


class _Share:
    """One device's rounds."""

    def __init__(self, job: Job, layers: list[int], device: str, rank: int) -> None:
        self.job, self.layers, self.rank = job, layers, rank
        self.started = time.monotonic()
        self.reading = self.learning = 0.0  # seconds
        first = job.fingerprint.layers.index(layers[0])
        self.learners = LayerLearners(layers, job.settings.learn, job.settings.seed, device, first=first)
        kept = job.run.load(_rounds_name(layers))
        self.done = 0  # rounds
        if kept is not None:
            self.learners.load_state(kept.tensors)
            self.done = kept.facts["rounds_done"]
        loaded = load_model(
            job.model, device, job.settings.dtype, job.settings.hf_overrides, job.settings.max_model_len
        )
        self.reader = _Reader(loaded, job, layers)

    def train(self) -> None:
        """Go on from the last finished round to the end."""
        plan, learners, reader = self.job.plan, self.learners, self.reader
        held_out = reader.read(None, plan.held_out_sequences)
        with ThreadPoolExecutor(1) as ahead:
            number = self.done
            waiting = ahead.submit(reader.sequences, number)
            while number < plan.rounds:
                if number < plan.first_annealed and learners.settled(LEAST_GAIN):
                    number = plan.first_annealed
                    waiting = ahead.submit(reader.sequences, number)
                before = time.monotonic()
                queries = None if learners.learners else reader.no_queries()
                store = reader.read(number, plan.sequences, waiting.result(), queries)
                self.reading += time.monotonic() - before
                if number + 1 < plan.rounds:
                    waiting = ahead.submit(reader.sequences, number + 1)
                self._learn(number, store, queries, held_out)
                number += 1
                if number < plan.rounds:
                    kept = Kept(learners.state(), {"rounds_done": number})
                    self.job.run.save(_rounds_name(self.layers), kept)
        finished = learners.finish(store, held_out)
        facts = {"errors": finished.errors, "rounds": finished.rounds}
        self.job.run.save(_finished_name(self.layers), Kept(finished.tensors, facts))
        if self.rank == 0:
            self._report_end(store)

    def _learn(self, number: int, store: torch.Tensor, queries: torch.Tensor | None, held_out: torch.Tensor) -> None:
        """One round of learning, and its errors."""
        before, plan = time.monotonic(), self.job.plan
        self.learners.learn(
            store,
            self.job.settings.passes,
            number,
            cooling=plan.cooling(number),
            queries=queries,
            quiet=self.rank > 0,
        )
        lost = self.learners.held_out(held_out)  # waits for the device
        self.learning += time.monotonic() - before
        if self.rank == 0:
            _report(number, plan.rounds, self.layers, lost, time.monotonic() - self.started)

    def _report_end(self, store: torch.Tensor) -> None:
        tokens = store.shape[2] * len(self.learners.losses)
        codes = tokens * self.job.settings.passes * len(KV) * store.shape[3] * len(self.layers)
        tqdm.write(
            f"kept {tokens} tokens in {self.reading:.1f} s of reading, made {codes} codes in {self.learning:.1f} s"
        )


class _Reader:
    """Text of every round, and the vectors that the model makes of it."""

    def __init__(self, loaded: Any, job: Job, layers: list[int]) -> None:
        self.loaded, self.job, self.layers = loaded, job, layers
        self.kind = loaded.device.type
        self.texts = texts_of(job.model, job.settings) if job.settings.data else None

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
            at_once = SEQUENCES_WRITTEN[self.kind]
            sequences = sequences_from_model(self.loaded, settings.length, count, seed, at_once)
        return capture(
            self.loaded,
            sequences,
            settings.kept_tokens,
            self.layers,
            (shape.num_kv_heads, shape.head_dim),
            settings.seed + (number or 0),
            batch=SEQUENCES_READ[self.kind],
            furthest=0 if number is None else self.job.plan.furthest,
            queries=queries,
        )


def _report(number: int, rounds: int, layers: list[int], lost: dict[int, torch.Tensor], seconds: float) -> None:
    """Each layer's error after a round."""
    start = f"round {number + 1}/{rounds}"
    for row, layer in enumerate(layers):
        words = "  ".join(
            f"{kv} " + " ".join(f"s={sparsity} {values[row, at]:.4f}" for sparsity, values in lost.items())
            for at, kv in enumerate(KV)
        )
        tqdm.write(f"{start}  layer {layer:3d}  energy lost  {words}")
    means = "  ".join(
        f"{kv} " + " ".join(f"s={sparsity} {values[:, at].mean():.4f}" for sparsity, values in lost.items())
        for at, kv in enumerate(KV)
    )
    tqdm.write(f"{start}  mean       energy lost  {means}  after {seconds:.0f} s")
