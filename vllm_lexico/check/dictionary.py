"""The dictionary that serving would take for a model, or the command that makes one and how long that takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from lexico_kernels.device.launch import STREAM_DIM

from vllm_lexico.check.model import ModelShape, weights_per_token
from vllm_lexico.dictionary.file import read_info
from vllm_lexico.dictionary.names import same_model, train_command
from vllm_lexico.dictionary.search import DictionaryNotFoundError, find_dictionary
from vllm_lexico.train.learn import LearnSettings

logger = logging.getLogger("vllm.lexico")


@dataclass(frozen=True)
class MeasuredTraining:
    """A training that was measured: a row `train_seconds` of benchmarks/results/dictionary.jsonl.

    seconds: all of it, of which `reading` and `learning` grow with the model.
    weights_per_token: that a token was multiplied with, without embedding and head.
    """

    model: str
    gpu: str
    date: str
    seconds: float
    reading: float
    learning: float
    layers: int
    num_kv_heads: int
    weights_per_token: float

    def seconds_for(self, layers: int, num_kv_heads: int, weights: float) -> float:
        """What a model of another shape takes.

        As many vectors per layer come from fewer tokens where there are more KV heads; reading a token takes as long as
        the weights that it meets, learning as long as the layers are many.
        """
        reading = self.reading * self.num_kv_heads / num_kv_heads * weights / self.weights_per_token
        return self.seconds - self.reading - self.learning + reading + self.learning * layers / self.layers


MEASURED = MeasuredTraining(
    model="Qwen/Qwen2.5-Coder-1.5B-Instruct",
    gpu="NVIDIA H100 80GB HBM3",
    date="2026-11-25",
    seconds=110.5,
    reading=32.8,
    learning=52.6,
    layers=28,
    num_kv_heads=2,
    weights_per_token=1.31e9,
)


@dataclass(frozen=True)
class DictionaryState:
    """What is known of a model's dictionary.

    path: of the file that serving would take, None where there is none.
    made_for: the model that it was made for; own: whether that is this one.
    atoms: of it, or of one that is made; num_bytes: that its codebooks take on each GPU.
    several: files that fit by shape alone, of which none is taken.
    command: that makes one; minutes: that it takes; based_on: what that is predicted from.
    """

    path: Path | None
    made_for: str | None
    own: bool
    atoms: int
    num_bytes: int
    several: str | None
    command: str
    minutes: float
    based_on: str


# The least memory of Hopper's GPUs, which keep atoms of heads of 128 in 8 bits three times: in two orders to choose by,
# and to be solved for.
HOPPER_BYTES = 79 << 30


def find_state(
    shape: ModelShape, max_model_len: int, gpus: int = 1, overrides: str = "", gpu_memory: int = 0
) -> DictionaryState:
    """Look for a model's dictionary as serving does, and predict how long making one takes.

    Args:
        shape: of the model.
        max_model_len: tokens that a request may have.
        gpus: that share its heads.
        overrides: of its configuration, as JSON.
        gpu_memory: bytes of each GPU.
    """
    path, info, several = None, None, None
    fingerprint = shape.fingerprint(max_model_len)
    try:
        path = find_dictionary(None, shape.name, fingerprint, overrides)
        info = read_info(path)
    except DictionaryNotFoundError as error:
        several = str(error) if "several other models" in str(error) else None
    atoms = info.atoms if info else LearnSettings().atoms
    heads, size = shape.heads.on_each(gpus), shape.heads.size
    streams = size == STREAM_DIM and gpu_memory >= HOPPER_BYTES
    seconds = MEASURED.seconds_for(len(shape.coded), shape.heads.number, weights_per_token(shape.text))
    return DictionaryState(
        path=path,
        made_for=info.model_name if info else None,
        own=info is not None and same_model(info.model_name, shape.name),
        atoms=atoms,
        # Keys and values of each head: the atoms in 16 bits, and in 8 bits those that coding takes.
        num_bytes=len(shape.coded) * 2 * heads * atoms * size * (5 if streams else 3),
        several=several,
        command=train_command(shape.name, overrides, fingerprint.short_context),
        minutes=seconds / 60,
        based_on=f"{MEASURED.seconds:.0f} s measured for {MEASURED.model} on one {MEASURED.gpu}, with --data",
    )
