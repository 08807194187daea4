"""Models that a GPU does not hold: weights wait in host memory, and one layer at a time comes onto the device.

Several batches are read at once, each in a thread of its own, and go forward together: all through a layer, then all
through the next. So a layer comes once for all of them, and each batch is read by the model's own code, whatever layers
it has. One thread runs at a time, always in the same order.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from vllm_lexico.train.model import count_parameters, read_config

SPARE_BYTES = 8 << 30  # of a GPU, for what is computed while it reads and learns, and
SPARE_SHARE = 0.1  # no more than this share of what is free


class _EndedError(Exception):
    """Another batch has failed, so that this one ends too."""


class Turns:
    """Whose turn it is, and which layer is on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.brought = 0  # layers, since the model was loaded
        self._here: nn.Module | None = None
        self._at_home: list[tuple[torch.Tensor, torch.Tensor]] = []  # a tensor of the layer that is here, its own data
        self._batons: list[threading.Semaphore] = []  # of the batches that are read
        self._left: set[int] = set()  # of them, those that are not at their end
        self._failed: BaseException | None = None
        self._own = threading.local()

    def run(self, reads: Sequence[Callable[[], None]]) -> None:
        """Call all, each until it comes to a layer, then all through that layer, and so on.

        Raises:
            Exception: what the first of them raised; the others have ended then.
        """
        self._batons = [threading.Semaphore(0) for _ in reads]
        self._left, self._failed = set(range(len(reads))), None
        threads = [
            threading.Thread(target=self._read, args=(number, self._batons[number], read), daemon=True)
            for number, read in enumerate(reads)
        ]
        for thread in threads:
            thread.start()
        self._batons[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C, while it waits
            self._fail(error)
            raise
        finally:
            self._batons = []
            self.bring(None)
        if self._failed is not None:
            raise self._failed

    def _read(self, number: int, baton: threading.Semaphore, read: Callable[[], None]) -> None:
        self._own.number, self._own.baton = number, baton
        try:
            self._wait(baton)
            with torch.no_grad():  # which is a thread's own
                read()
        except _EndedError:
            return
        except BaseException as error:
            self._fail(error)
            return
        self._left.discard(number)
        self._pass_on(number)

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        for baton in list(self._batons):
            baton.release()

    def _wait(self, baton: threading.Semaphore) -> None:
        baton.acquire()
        if self._failed is not None:
            raise _EndedError

    def _pass_on(self, number: int) -> None:
        """To the next of those that are left."""
        if self._left:
            after = [other for other in self._left if other > number]
            self._batons[min(after or self._left)].release()

    def arrive(self, layer: nn.Module) -> None:
        """A batch is at a layer: the others come first, and when it is its turn again the layer is there."""
        number = getattr(self._own, "number", None)
        if number is not None and len(self._left) > 1:
            self._pass_on(number)
            self._wait(self._own.baton)
        if self._here is not layer:
            self.bring(layer)

    def bring(self, layer: nn.Module | None) -> None:
        """Put a layer on the device in place of the one that is there; None: nothing in its place."""
        for tensor, data in self._at_home:
            tensor.data = data
        self._at_home, self._here = [], layer
        if layer is not None:
            self.brought += 1
            for tensor in chain(layer.parameters(), layer.buffers()):
                self._at_home.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device, non_blocking=True)


class WaitingLayer(nn.Module):
    """A layer that is on the device while it is read with; in all else it is that layer."""

    def __init__(self, layer: nn.Module, turns: Turns) -> None:
        super().__init__()
        self.layer, self.turns = layer, turns

    def __getattr__(self, name: str) -> Any:
        """What the layer has: models ask for its kind of attention, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's."""
        self.turns.arrive(self.layer)
        return self.layer(*args, **kwargs)


def hold_in_turn(model: nn.Module, decoder: nn.Module, layers: int, device: str) -> None:
    """Have the layers of a model wait in host memory; all else goes onto the device.

    Args:
        model: of transformers, on the CPU.
        decoder: the module of it that has the layers.
        layers: how many.
        device: "cuda:1" and so on, or "cpu".

    Raises:
        ValueError: no list of so many layers is found in it.
    """
    own = next(
        (part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == layers),
        None,
    )
    if own is None:
        raise ValueError(
            f"the layers of {type(decoder).__name__} are not in one list, so that they cannot come one after the "
            f"other; allowed are models that have all {layers} in one; take a GPU that holds the whole model, or a "
            f"smaller --dtype"
        )
    turns = Turns(device)
    plain = list(own)
    for number in range(layers):
        own[number] = nn.Identity()
    model.to(device)
    for number, layer in enumerate(plain):
        own[number] = WaitingLayer(layer, turns)


def turns_of(decoder: nn.Module) -> Turns | None:
    """What the layers of a decoder wait for; None where they are all on the device."""
    return next((part.turns for part in decoder.modules() if isinstance(part, WaitingLayer)), None)


def read_all(decoder: nn.Module, reads: Sequence[Callable[[], None]], together: int) -> None:
    """Call all of them, so many at once where the decoder's layers come one after the other.

    Args:
        decoder: that they read with, once each.
        reads: each reads one batch.
        together: how many of them may be under way.
    """
    turns = turns_of(decoder)
    if turns is None:
        for read in reads:
            read()
        return
    for at in range(0, len(reads), max(1, together)):
        turns.run(reads[at : at + max(1, together)])


def comes_in_turn(model: str, dtype: str, overrides: str, beside: int, device: str) -> bool:
    """Whether a device is too small for a model, so that its layers come one after the other.

    Args:
        model: hub id or folder.
        dtype: of the weights, "auto" for the checkpoint's own.
        overrides: of its configuration, a JSON object, or "".
        beside: bytes of the vectors that are held at once on a device.
        device: "cuda:1" and so on; a CPU's memory is where layers would wait.
    """
    if not device.startswith("cuda"):
        return False
    weights = weight_bytes(model, dtype, overrides)
    free, _ = torch.cuda.mem_get_info(device)
    return weights is not None and is_too_large(weights, beside, free)


def weight_bytes(model: str, dtype: str, overrides: str) -> int | None:
    """Of all weights of a model, as they will be on a device; None where that is not known. See `comes_in_turn`."""
    config = read_config(model, overrides)
    numbers, taken = count_parameters(config), (config.dtype or torch.bfloat16) if dtype == "auto" else dtype
    return None if numbers is None else numbers * (4 if str(taken).endswith("float32") else 2)


def refuse_writing(model: str, *, by_vllm: bool = True) -> None:
    """Refuse to have transformers write with a model that comes in turn: each token would take all of its weights.

    Args:
        model: hub id or folder.
        by_vllm: whether vLLM could write in its place.

    Raises:
        ValueError: with what to do.
    """
    allowed = remedy = ""
    if by_vllm:
        allowed = ", or that vLLM writes"
        remedy = ", or the name of a quantized twin that vLLM can start, whose dictionary serves this model too"
    raise ValueError(
        f"{model} is larger than the GPU, which reads text with one layer at a time and cannot write any so; allowed: "
        f"text that is there{allowed}; give --data{remedy}"
    )


def is_too_large(weights: int, beside: int, free: int) -> bool:
    """Whether the layers of a model have to come one after the other.

    Not where there is too little memory for anything: that is then said when it runs out.

    Args:
        weights: bytes of all of them.
        beside: bytes of the vectors that are held at once.
        free: bytes of the device.
    """
    beside += min(SPARE_BYTES, int(free * SPARE_SHARE))
    return beside < free < weights + beside
