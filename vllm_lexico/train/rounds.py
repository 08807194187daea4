"""The rounds of one device: its layers learn from what the model reads, until their part of the file is done."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.tensors import ASKED_SHARES
from vllm_lexico.train.asked import Asking, measure_shares, words_for_shares
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.layer_learners import FinishedLayers, LayerLearners
from vllm_lexico.train.memory import words_for_memory
from vllm_lexico.train.own_text import read_tokenizer, sequences_from_model, split
from vllm_lexico.train.package_text import PackageRows, mixed
from vllm_lexico.train.parents import read_parent
from vllm_lexico.train.progress import Progress, Stage
from vllm_lexico.train.settings import Plan, TrainSettings
from vllm_lexico.train.state import Kept, RunFolder
from vllm_lexico.train.texts import TextSequences
from vllm_lexico.train.writing import written_rows

LEAST_GAIN = 0.003  # of the error, from round to round; with less annealing begins
SEQUENCES_WRITTEN = {"cuda": 512, "cpu": 8}  # at once, by kind of device
SEQUENCES_READ = {"cuda": 8, "cpu": 1}
# Seconds for a token written or read and for a code, by kind of device, until the run has told its own.
GUESSES = {
    "cuda": {
        "write": 1 / 25_000,
        "read": 1 / 30_000,
        "learn": 1 / 15_000_000,
        "finish": 1 / 15_000_000,
        "ask": 1 / 15_000,
    },
    "cpu": {"write": 1 / 110, "read": 1 / 290, "learn": 1 / 11_000, "finish": 1 / 11_000, "ask": 1 / 200},
}
ASKED = "asked"  # name of the state that holds what is measured of all layers, by the first device
FINISH_CODES = 16_000  # for the levels and the last errors, per layer, for keys and for values each


@dataclass(frozen=True)
class Job:
    """What the processes of one run have in common.

    Args:
        model: hub id or folder.
        settings: what the user asked for.
        fingerprint: of the model.
        plan: how the reading is divided.
        run: where state is kept.
        started: `time.time()` then.
        verbose: every layer's errors are told.
        in_turn: the model's layers wait in host memory, see `in_turn`.
    """

    model: str
    settings: TrainSettings
    fingerprint: ModelFingerprint
    plan: Plan
    run: RunFolder
    started: float
    verbose: bool = False
    in_turn: bool = False


@lru_cache(1)
def texts_of(model: str, settings: TrainSettings) -> TextSequences:
    """The text of a run with data; read once per process. ValueError when it cannot be read."""
    from transformers import AutoTokenizer

    return TextSequences(settings.data, AutoTokenizer.from_pretrained(model), settings.length, settings.seed)


def finished_layers(run: RunFolder, layers: list[int]) -> FinishedLayers | None:
    """What some layers add to the file, if they are done."""
    kept = run.load(finished_name(layers))
    return None if kept is None else FinishedLayers(kept.tensors, **kept.facts)


def asked_shares(run: RunFolder) -> dict[str, torch.Tensor] | None:
    """What the file gets to say of how often heads are asked, if that is measured; empty where it cannot be."""
    kept = run.load(ASKED)
    return None if kept is None else kept.tensors


def finished_name(layers: list[int]) -> str:
    """Of the state in which a device's layers are done."""
    return f"layers_{layers[0]:03d}_finished"


def rounds_name(layers: list[int]) -> str:
    """Of the state after a device's rounds."""
    return f"layers_{layers[0]:03d}_rounds"


def train_share(
    rank: int,
    job: Job,
    shares: list[tuple[str, list[int]]],
    progress: Progress | None = None,
    loaded: "Share | None" = None,
) -> None:
    """Train the layers of one device and leave their part of the file in the run's folder.

    Args:
        rank: of the device.
        job: of the run.
        shares: each device's layers.
        progress: of the run; None in a process of its own, of which the first shows how far it is.
        loaded: the device's, where it is loaded already.
    """
    device, layers = shares[rank]
    progress = progress or Progress(shown=rank == 0, verbose=job.verbose, started=job.started)
    try:
        measures = rank == 0
        if finished_layers(job.run, layers) is None or (measures and asked_shares(job.run) is None):
            with words_for_memory("loading the model", device):
                share = loaded or Share(job, layers, device, progress)
            share.train(measures=measures)
    finally:
        progress.close()


def stages_of(job: Job, layers: int, kind: str, *, writes: bool, done: int = 0) -> list[Stage]:
    """The stages of a device's share.

    Args:
        job: of the run.
        layers: that the device has.
        kind: of device.
        writes: whether transformers writes the text.
        done: rounds that are finished.
    """
    plan, settings, guesses = job.plan, job.settings, GUESSES[kind]
    dictionaries = layers * len(KV)

    def reading(words: str, sequences: int) -> list[Stage]:
        tokens, own = sequences * settings.length, settings.own_sequences(sequences) * settings.length
        written = [Stage("write", f"writing text {words}", own, guesses["write"])] if writes else []
        return [*written, Stage("read", f"reading text {words}", tokens, guesses["read"])]

    stages = reading("to test with", plan.held_out_sequences)
    vectors = plan.sequences * settings.kept_tokens * job.fingerprint.num_kv_heads
    for number in range(done, plan.rounds):
        words = f"round {number + 1} of {plan.rounds}"
        stages += reading(f"({words})", plan.sequences)
        codes = vectors * settings.passes * dictionaries
        stages.append(Stage("learn", f"learning atoms ({words})", codes, guesses["learn"]))
    copies = 1 if settings.learn.shared else job.fingerprint.num_kv_heads
    codes = FINISH_CODES * copies * dictionaries
    finishing = Stage("finish", "measuring what is lost", codes, guesses["finish"])
    tokens = Asking.of(None, kind, plan.furthest).read_tokens
    return [*stages, finishing, Stage("ask", "repeating texts to see which layers are asked", tokens, guesses["ask"])]


class Share:
    """One device's rounds, and the model that they read with, which is loaded when this is made, before the text."""

    def __init__(self, job: Job, layers: list[int], device: str, progress: Progress) -> None:
        self.job, self.layers, self.device, self.progress = job, layers, device, progress
        self.reading = self.learning = 0.0  # seconds
        first = job.fingerprint.layers.index(layers[0])
        parent = read_parent(Path(job.settings.continue_from), layers) if job.settings.continue_from else None
        learn, seed = job.settings.learn, job.settings.seed
        self.learners = LayerLearners(layers, learn, seed, device, first=first, parent=parent)
        kept = job.run.load(rounds_name(layers))
        self.done = 0  # rounds
        if kept is not None:
            self.learners.load_state(kept.tensors)
            self.done = kept.facts["rounds_done"]
        loaded = load_model(
            job.model,
            device,
            job.settings.dtype,
            job.settings.hf_overrides,
            job.settings.max_model_len,
            in_turn=job.in_turn,
        )
        self.reader = _Reader(loaded, job, layers, progress)

    def train(self, *, measures: bool) -> None:
        """Go on from the last finished round to the end. measures: how often heads of all layers are asked, too."""
        plan, learners, reader = self.job.plan, self.learners, self.reader
        reader.find_text()
        stages = stages_of(self.job, len(self.layers), reader.kind, writes=reader.writes, done=self.done)
        self.progress.plan(stages)
        held_out = self._read(None, plan.held_out_sequences, reader.sequences(None))
        with ThreadPoolExecutor(1) as ahead:
            number = self.done
            waiting = ahead.submit(reader.sequences, number)
            while number < plan.rounds:
                if number < plan.first_annealed and learners.settled(LEAST_GAIN):
                    skipped = plan.first_annealed - number
                    for stage in ("read", "learn", *(["write"] if reader.writes else [])):
                        self.progress.skip(stage, skipped)
                    number = plan.first_annealed
                    waiting = ahead.submit(reader.sequences, number)
                before = time.monotonic()
                queries = None if learners.learners else reader.no_queries()
                store = self._read(number, plan.sequences, waiting.result(), queries)
                self.reading += time.monotonic() - before
                if number + 1 < plan.rounds:
                    waiting = ahead.submit(reader.sequences, number + 1)
                self._learn(number, store, queries, held_out)
                number += 1
                if number < plan.rounds:
                    kept = Kept(learners.state(), {"rounds_done": number})
                    self.job.run.save(rounds_name(self.layers), kept)
        with words_for_memory("learning", self.device), self.progress.stage("finish"):
            finished = learners.finish(store, held_out)
        tokens = store.shape[2]
        del store
        if measures and asked_shares(self.job.run) is None:
            self._measure_asked()
        facts = {"errors": finished.errors, "rounds": finished.rounds}
        self.job.run.save(finished_name(self.layers), Kept(finished.tensors, facts))
        self._report_end(tokens)

    def _read(self, number: int | None, *args: Any) -> torch.Tensor:
        with words_for_memory("reading", self.device):
            return self.reader.read(number, *args)

    def _learn(self, number: int, store: torch.Tensor, queries: torch.Tensor | None, held_out: torch.Tensor) -> None:
        """One round of learning, and its errors."""
        before, plan = time.monotonic(), self.job.plan
        with words_for_memory("learning", self.device), self.progress.stage("learn"):
            self.learners.learn(
                store,
                self.job.settings.passes,
                number,
                cooling=plan.cooling(number),
                queries=queries,
                advance=self.progress.advance,
            )
            lost = self.learners.held_out(held_out)  # waits for the device
        self.learning += time.monotonic() - before
        _report(self.progress, number, plan.rounds, self.layers, lost, time.time() - self.job.started)

    def _measure_asked(self) -> None:
        """Leave in the run's folder how often each head of all layers is asked; nothing of a model too short for it."""
        shape, asking, tensors = self.job.fingerprint, self.reader.asking, {}
        if asking.tokens:
            texts = asking.cut(self.reader.to_repeat())
            began, layers = time.monotonic(), shape.layers
            with words_for_memory("reading", self.device), self.progress.stage("ask"):
                shares = measure_shares(
                    self.reader.loaded, texts, layers, shape.num_kv_heads, asking, self.progress.advance
                )
            self.progress.say(words_for_shares(shares, layers, texts, began))
            tensors[ASKED_SHARES] = shares
        self.job.run.save(ASKED, Kept(tensors, {}))

    def _report_end(self, kept_tokens: int) -> None:
        tokens = kept_tokens * len(self.learners.losses)
        codes = tokens * self.job.settings.passes * len(KV) * self.job.fingerprint.num_kv_heads * len(self.layers)
        self.progress.say(
            f"kept {tokens} tokens in {self.reading:.1f} s of reading, made {codes} codes in {self.learning:.1f} s"
        )


class _Reader:
    """Text of every round, and the vectors that the model makes of it."""

    def __init__(self, loaded: Any, job: Job, layers: list[int], progress: Progress) -> None:
        self.loaded, self.job, self.layers, self.progress = loaded, job, layers, progress
        self.kind = loaded.device.type
        self.texts = texts_of(job.model, job.settings) if job.settings.data else None
        self.rows: torch.Tensor | None = None  # what vLLM has written
        self.package: PackageRows | None = None
        tokenizer, settings = read_tokenizer(job.model), job.settings
        if settings.package_text:
            self.package = PackageRows(tokenizer, settings.length, settings.seed, job.plan.rounds)
        self.held_out: torch.Tensor | None = None  # what transformers has written of it
        self.asking = Asking.of(tokenizer, self.kind, job.plan.furthest)

    @property
    def writes(self) -> bool:
        """Whether transformers writes the text."""
        return self.texts is None and self.rows is None

    def tokenize(self) -> None:
        """Have the package's rows of all rounds ready, which need no other text."""
        if self.package is not None:
            count = self.job.plan.sequences
            self.package.take(count - self.job.settings.own_sequences(count), 0)

    def find_text(self) -> None:
        """Take what vLLM has written, if it has."""
        if self.texts is None:
            self.rows = written_rows(self.job.run, self.job.settings.length)

    def sequences(self, number: int | None) -> torch.Tensor | None:
        """A round's text, the held-out one for None, which can be made while the GPU learns.

        None where transformers is still to write it.
        """
        plan = self.job.plan
        if self.texts is not None:
            return self.texts.take(plan.held_out_sequences if number is None else plan.sequences, number)
        if self.rows is None:
            return None
        own = self.job.settings.own_sequences
        if number is None:
            return self._beside(self.rows[: own(plan.held_out_sequences)], number)
        first = own(plan.held_out_sequences) + number * own(plan.sequences)
        return self._beside(self.rows[first : first + own(plan.sequences)], number)

    def _beside(self, own: torch.Tensor, number: int | None) -> torch.Tensor:
        """Rows that the model wrote, with those of the package that a round has, the held-out ones for None."""
        if self.package is None:
            return own
        plan, seed = self.job.plan, self.job.settings.seed * 1000 + (999 if number is None else number)
        count = plan.held_out_sequences if number is None else plan.sequences
        return mixed(own, self.package.take(count - self.job.settings.own_sequences(count), number), seed)

    def to_repeat(self) -> torch.Tensor:
        """Text by which it is measured how often heads are asked: int64 [rows, length], the same on every call.

        Held-out text, where transformers writes: it is there in every run, resumed or not.
        """
        rows = self.asking.rows(self.job.settings.length)
        if self.texts is not None:
            return self.texts.take(rows, self.job.plan.rounds)
        found = self.held_out if self.rows is None else self.rows
        assert found is not None, "the held-out text is read first"
        return found[:rows]

    def no_queries(self) -> torch.Tensor:
        """Zeros to which `read` adds the energy of queries."""
        shape = len(self.layers), self.job.fingerprint.num_kv_heads, self.job.fingerprint.head_dim
        return torch.zeros(shape, device=self.loaded.device)

    def read(
        self,
        number: int | None,
        count: int,
        sequences: torch.Tensor | None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """K and V of a round, or the held-out ones for None: see `capture.capture`."""
        settings, shape = self.job.settings, self.job.fingerprint
        if sequences is None:
            with self.progress.stage("write"):
                sequences = self._beside(self._written(number, settings.own_sequences(count)), number)
            self.held_out = sequences if number is None else self.held_out
        with self.progress.stage("read"):
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
                advance=self.progress.advance,
            )

    def _written(self, number: int | None, count: int) -> torch.Tensor:
        """Text that the model writes under transformers: int64 [count, length], long rows of several texts."""
        settings = self.job.settings
        seed, parts = settings.seed * 1000 + (999 if number is None else number), split(settings.length)
        sequences = sequences_from_model(
            self.loaded,
            -(-settings.length // parts),
            count * parts,
            seed,
            SEQUENCES_WRITTEN[self.kind],
            self.progress.advance,
        )
        return sequences.view(count, -1)[:, : settings.length]


def _report(
    progress: Progress,
    number: int,
    rounds: int,
    layers: list[int],
    lost: dict[int, torch.Tensor],
    seconds: float,
) -> None:
    """What is lost after a round; of each layer where details are wanted."""
    start = f"round {number + 1}/{rounds}"
    for row, layer in enumerate(layers):
        words = "  ".join(
            f"{kv} " + " ".join(f"s={sparsity} {values[row, at]:.4f}" for sparsity, values in lost.items())
            for at, kv in enumerate(KV)
        )
        progress.say(f"{start}  layer {layer:3d}  energy lost  {words}", detail=True)
    means = "  ".join(
        f"{kv} " + " ".join(f"s={sparsity} {values[:, at].mean():.4f}" for sparsity, values in lost.items())
        for at, kv in enumerate(KV)
    )
    progress.say(f"{start}  mean       energy lost  {means}  after {seconds:.0f} s")
