"""What a training is asked for, checked before any work is done, and how its reading is divided into rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexico_kernels.memory.layout import MAX_ATOMS, MAX_SPARSITY

from vllm_lexico.dictionary.atoms import ATOM_BITS
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train.capture import SKIPPED_TOKENS
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.model import check_overrides
from vllm_lexico.train.texts import check_source
from vllm_lexico.train.writing import WRITERS

ROUND_BYTES = {"cuda": 12 << 30, "cpu": 1 << 30}  # of vectors held at once, by kind of device
HELD_OUT_TOKENS = {"cuda": 8192, "cpu": 2048}  # positions kept, of texts that are not trained on
FURTHEST_TOKENS = 32768  # where in a context text is read, if the model goes so far
READ_TOKENS = {"cuda": 2048, "cpu": 1024}  # of a text, where nothing else is asked for and the model takes as many
LARGEST_SEED = 2**32 - 1  # the seeds of rounds and layers, made of it, fit into 64 bits


@dataclass(frozen=True)
class Effort:
    """What is learned from where nothing else is asked for; see `TrainSettings` and `LearnSettings`."""

    atoms: int
    batch: int
    vectors: int
    passes: int
    rounds: int
    shared: bool = False
    text_tokens: int | None = None
    package_text: float = 0.8


# By kind of device. On two cores of a CPU all that is learned is some millions of codes, and short texts, all of one
# length, are written with the fewest passes over the weights (docs/log.md).
EFFORTS = {
    "cuda": Effort(atoms=4096, batch=8192, vectors=2_000_000, passes=8, rounds=4),
    "cpu": Effort(atoms=1024, batch=1024, vectors=40_000, passes=1, rounds=2, shared=True, text_tokens=256),
}
# The same where a dictionary is adapted, which has its atoms.
ADAPTING = {
    "cuda": Effort(atoms=0, batch=8192, vectors=500_000, passes=4, rounds=2),
    "cpu": Effort(atoms=0, batch=1024, vectors=20_000, passes=1, rounds=1, text_tokens=256),
}
CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # what Linux calls arithmetic in it; without, float32 is faster
CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class TrainSettings:
    """Everything but the model that decides the outcome.

    Args:
        data: files, folders or Hugging Face datasets; () for text that the model writes itself.
        learn: how atoms are learned.
        vectors: different ones per layer, for keys and for values each.
        passes: how often each vector is learned from.
        rounds: of reading and learning; more where memory asks for it, fewer where they gain nothing. 0 where the
            dictionary to go on from gets nothing but how often its heads are asked.
        sequence_tokens: length of the texts read; None for READ_TOKENS, at most the model's longest.
        dtype: of the model; "auto" for its own, see also `cpu_dtype`.
        seed: of everything random, 0 to 2**32 - 1.
        hf_overrides: of the model's configuration, a JSON object as vLLM's --hf-overrides takes it; "" for none.
        max_model_len: tokens of the longest sequence that is served; None for the model's own longest. It bounds where
            in a context text is read, and chooses between two sets of rotary factors where the model has them.
        writer: what has the model write where there is no data, one of WRITERS; "auto" for vLLM where it is installed
            and can.
        text_tokens: of a text that vLLM has the model write, all written to this length; None for as long as they come.
        package_text: share of the reading that is real text, of the package, where there is no data; 0 to 0.9.
        continue_from: a dictionary file that is adapted, whose number of atoms, bits and sharing are kept; "" for none.

    Raises:
        ValueError: a setting is out of range, or a source of data is neither a path nor a dataset.
    """

    data: tuple[str, ...] = ()
    learn: LearnSettings = LearnSettings()
    vectors: int = 2_000_000
    passes: int = 8
    rounds: int = 4
    sequence_tokens: int | None = None
    dtype: str = "auto"
    seed: int = 0
    hf_overrides: str = ""
    max_model_len: int | None = None
    writer: str = "transformers"
    text_tokens: int | None = None
    package_text: float = 0.0
    continue_from: str = ""

    def __post_init__(self) -> None:
        learn, least = self.learn, 2 * self.learn.atoms
        check("--atoms", learn.atoms, 2 <= learn.atoms <= MAX_ATOMS, f"2 to {MAX_ATOMS}")
        check("--atom-bits", learn.atom_bits, learn.atom_bits in ATOM_BITS, " or ".join(map(str, ATOM_BITS)))
        check("--sparsity", learn.sparsity, 1 <= learn.sparsity <= MAX_SPARSITY, f"1 to {MAX_SPARSITY}")
        check("--key-metric", learn.key_metric, 0 <= learn.key_metric <= 1, "0 to 1")
        check("--passes", self.passes, self.passes >= 1, "1 or more")
        least_rounds = 0 if self.continue_from else 1
        check("--rounds", self.rounds, self.rounds >= least_rounds, "1 or more, and 0 with --continue-from")
        check("--vectors", self.vectors, self.vectors >= least, f"{least} or more (2 per atom)")
        given, shortest = self.sequence_tokens, 4 * SKIPPED_TOKENS
        check("--sequence-tokens", given, given is None or given >= shortest, f"{shortest} or more")
        least, texts = 4 * SKIPPED_TOKENS, self.text_tokens
        check("--text-tokens", texts, texts is None or texts >= least, f"{least} or more")
        check("--package-text", self.package_text, 0 <= self.package_text <= 0.9, "0 to 0.9")
        check("--seed", self.seed, 0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}")
        check("--max-model-len", self.max_model_len, self.max_model_len is None or self.max_model_len >= 1, "1 or more")
        if self.hf_overrides:
            check_overrides(self.hf_overrides)
        check("--writer", self.writer, self.writer in WRITERS, ", ".join(WRITERS))
        for name in self.data:
            check_source(name)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.sequence_tokens or READ_TOKENS["cuda"]

    def own_sequences(self, count: int) -> int:
        """How many of so many sequences the model writes itself where there is no data."""
        return count - int(count * self.package_text)

    @property
    def kept_tokens(self) -> int:
        """Positions of a sequence whose vectors are kept.

        More different texts are worth more than all of each, but what the model has to write is too dear to leave.
        """
        return self.length // 2 if self.data else self.length - SKIPPED_TOKENS


@dataclass(frozen=True)
class Plan:
    """How the reading is divided.

    Args:
        rounds: of reading and learning.
        sequences: per round.
        held_out_sequences: those that errors are measured on.
        furthest: see `capture.capture`.
    """

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
        """For a device of some kind. max_tokens: of the longest context that is served."""
        kept, heads = settings.kept_tokens, fingerprint.num_kv_heads
        token_bytes = bytes_per_token(settings, fingerprint)
        tokens = math.ceil(settings.vectors / heads)
        rounds = max(settings.rounds, math.ceil(tokens * token_bytes / ROUND_BYTES[kind]))
        sequences = max(1, math.ceil(tokens / rounds / kept))
        held_out = max(1, min(HELD_OUT_TOKENS[kind] // kept, math.ceil(sequences / 4)))
        return Plan(rounds, sequences, held_out, min(max_tokens, FURTHEST_TOKENS))


def bytes_per_token(settings: TrainSettings, fingerprint: ModelFingerprint) -> int:
    """Of a token's vectors in all coded layers, as they are held."""
    number_bytes = 4 if settings.dtype == "float32" else 2
    return len(fingerprint.layers) * 2 * fingerprint.num_kv_heads * fingerprint.head_dim * number_bytes


def cpu_dtype(dtype: str) -> str:
    """What "auto" means on a CPU: float32 where it has no arithmetic in bfloat16, which is then much slower."""
    if dtype != "auto":
        return dtype
    facts = CPU_FACTS.read_text(encoding="utf-8", errors="replace").split() if CPU_FACTS.is_file() else []
    return "auto" if CPU_BFLOAT16 & set(facts) else "float32"


def own_tokens(settings: TrainSettings, plan: Plan) -> int:
    """What the model writes for a run without data."""
    own = settings.own_sequences
    return (plan.rounds * own(plan.sequences) + own(plan.held_out_sequences)) * settings.length


def cpu_words(settings: TrainSettings, plan: Plan) -> str:
    """What a CPU learns, in a line."""
    learn, text = settings.learn, "the given text"
    if not settings.data:
        tokens = own_tokens(settings, plan)
        pieces = f" ({settings.text_tokens} each)" if settings.text_tokens else ""
        text = f"{tokens:,} tokens of its own text{pieces}"
        if settings.package_text:
            text += f" beside {settings.package_text:.0%} of the package's"
    return (
        f"on a CPU: the model in {'its own dtype' if settings.dtype == 'auto' else settings.dtype}, {text}, "
        f"{settings.vectors:,} vectors for each of K and V of a layer, {rounds_in_words(plan.rounds)}, "
        f"{learn.atoms} atoms"
        f"{' that heads share' if learn.shared else ''}; a GPU learns from more (--help says what can be set)"
    )


def rounds_in_words(count: int) -> str:
    """ "1 round", "2 rounds"."""
    return f"{count} round{'s' * (count != 1)}"


def check(name: str, given: Any, valid: bool, allowed: str) -> None:
    """Refuse a flag's value: ValueError with what is allowed."""
    if not valid:
        raise ValueError(f"{name} is {given}; allowed: {allowed}; change it")


def share_layers(layers: Sequence[int], devices: Sequence[str], together: int = 1) -> list[tuple[str, list[int]]]:
    """Each device's layers, neighbours together; no more devices than there is something for.

    together: layers that learn together, counted from the first. They stay together, so that a seed decides the same
        file however many devices there are.
    """
    groups = -(-len(layers) // together)
    count = min(len(devices), groups)
    edges = [at * groups // count * together for at in range(count + 1)]
    return [(devices[at], list(layers[edges[at] : edges[at + 1]])) for at in range(count)]
