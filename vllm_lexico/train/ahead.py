"""What a run does while vLLM starts and writes: all that needs no text, so that the first round begins at once.

vLLM is a process of its own, and its start takes longer than its writing. So once that process runs, this one loads the
model, makes tokens of the package's text, and has the kernels of learning compiled, and only then listens to what vLLM
says, which waits in a pipe meanwhile. Nothing runs in a thread: what interrupts or fails ends vLLM as it always does.

Two processes then share a GPU's memory. vLLM takes a share of what is free and starts only if there is as much, so it
is told how much it may count on, whether this process has taken its own part by then or not. Where a GPU would be
narrow for both, where layers come in turn or several devices share them, where weights are quantized, and on a CPU, all
comes after the text, as it does where vLLM has no text to write.
"""

from contextlib import suppress

import torch

from vllm_lexico.train.in_turn import weight_bytes
from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.memory import words_for_memory
from vllm_lexico.train.model import read_config
from vllm_lexico.train.progress import Progress
from vllm_lexico.train.rounds import Job, Share
from vllm_lexico.train.settings import bytes_per_token, own_tokens
from vllm_lexico.train.vllm_writer import SPARE_SHARE

WORK_BYTES = 4 << 30  # beside the model: what learning and its compiling take at once, and what torch keeps of it
NOISE_BYTES = WORK_BYTES // 8  # of a layer's vectors, of which learning makes copies
ROOM_BYTES = 8 << 30  # for what vLLM computes and captures


class Ahead:
    """What is there when the text is.

    Args:
        job: of the run.
        shares: each device's layers.
        progress: of the run.
    """

    def __init__(self, job: Job, shares: list[tuple[str, list[int]]], progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.device, self.layers = shares[0]
        self.share: Share | None = None  # what is loaded
        self.most_bytes = None if len(shares) > 1 else bytes_for_vllm(job, self.device)

    @property
    def fits(self) -> bool:
        """Whether anything is done ahead. `most_bytes` is then what vLLM may count on, else None."""
        return self.most_bytes is not None

    def prepare(self) -> None:
        """Do it. What the device does not hold beside vLLM is left for later; other errors are those of later.

        Memory that torch keeps is not given back here: vLLM ends if more is free after it has measured than before.
        """
        with words_for_memory("loading the model", self.device), suppress(torch.OutOfMemoryError):
            self.share = Share(self.job, self.layers, self.device, self.progress)
            self.share.reader.tokenize()
            compile_learning(self.job, self.share.reader.loaded.dtype, self.device)


def bytes_for_vllm(job: Job, device: str) -> int | None:
    """Bytes of a GPU that vLLM may count on beside what is loaded ahead; None where nothing is.

    They hold its weights and the cache of all tokens that it writes, so that it writes the same text as it would alone,
    also where ours come while it measures, which it then counts as its own.
    """
    settings = job.settings
    if not device.startswith("cuda") or job.in_turn:
        return None
    if getattr(read_config(job.model, settings.hf_overrides), "quantization_config", None) is not None:
        return None  # they become ordinary weights on the device
    weights = weight_bytes(job.model, settings.dtype, settings.hf_overrides)
    free, total = torch.cuda.mem_get_info(device)
    cache = own_tokens(settings, job.plan) * bytes_per_token(settings, job.fingerprint)
    if weights is None or free - SPARE_SHARE * total < 3 * weights + 2 * WORK_BYTES + ROOM_BYTES + cache:
        return None
    return free - weights - WORK_BYTES


def compile_learning(job: Job, dtype: torch.dtype, device: str) -> None:
    """Have all compiled that learning and finishing launch: a layer is learned from noise, in the sizes of the run.

    It takes a layer's share of a round, and is left out where that is large. Its random numbers are its own, and
    nothing of it is kept.

    Args:
        job: of the run.
        dtype: of the model, in which vectors are kept.
        device: where it is done.
    """
    plan, settings, shape = job.plan, job.settings, job.fingerprint
    vectors = plan.sequences * settings.kept_tokens * bytes_per_token(settings, shape) // len(shape.layers)
    if vectors > NOISE_BYTES:
        return
    generator = torch.Generator(device).manual_seed(0)

    def noise(sequences: int) -> torch.Tensor:
        size = 1, 2, sequences * settings.kept_tokens, shape.num_kv_heads, shape.head_dim
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    store, held_out = noise(plan.sequences), noise(plan.held_out_sequences)
    learners = LayerLearners([0], settings.learn, 0, device)
    for cooling in (None, (0.0, 1.0)):
        learners.learn(store, 1, 0, cooling=cooling)
    learners.held_out(held_out)
    learners.finish(store, held_out)
