"""`vllm-lexico train` on one GPU and on several: how long each takes, and whether they write the same file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from training import KEPT

from bench.texts import TEXT
from vllm_lexico.dictionary.file import Dictionary, load_dictionary

# Small, so that three trainings take little more than a minute: what is asked is whether layers learn the same wherever
# they learn.
SETTINGS = ("--vectors", "1000000", "--atoms", "4096", "--passes", "4", "--rounds", "4", "--seed", "0")

Row = tuple[dict[str, Any], str, float, str | None, float | None]  # case, metric, value, peer, peer's value


class Trained(NamedTuple):
    """A training: seconds of the whole command, and of reading and learning by the device that reports."""

    file: Path
    seconds: float
    reading: float
    learning: float


def train(
    model: Path,
    out: Path,
    gpus: Sequence[str],
    timeout: float,
    *,
    settings: Sequence[str] = SETTINGS,
    device: str = "cuda",
) -> Trained:
    """Train a dictionary in a process of its own.

    Args:
        model: a checkpoint's folder.
        out: the file to write.
        gpus: those that PyTorch is shown.
        timeout: seconds.
        settings: flags of `vllm-lexico train`.
        device: "cpu" to try this out.

    Raises:
        RuntimeError: it failed, with the end of what it printed; TimeoutExpired.
    """
    text = out.with_suffix(".txt")
    text.write_text(TEXT, encoding="utf-8")
    command = [sys.executable, "-m", "vllm_lexico.cli", "train", str(model), "--name", model.name, "--out", str(out)]
    command += ["--data", str(text), "--device", device, *settings]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    seconds, kept = time.monotonic() - began, KEPT.search(result.stdout + result.stderr)
    if result.returncode or kept is None:
        raise RuntimeError(f"training on {len(gpus)} GPUs failed: {(result.stdout + result.stderr)[-2000:]}")
    return Trained(out, seconds, float(kept[2]), float(kept[4]))


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Of two dictionaries of the same model: how many tensors there are, how many differ, and by how much.

    Returns:
        tensors, differ: counts. sha256: of all tensors of each. atoms_that_differ: share of the rows of atoms.
        loss_apart: the mean relative difference of the energy lost on held-out text.
    """
    first, second = load_dictionary(one), load_dictionary(other)
    names = sorted(first.tensors)
    differ = [name for name in names if not torch.equal(first.tensors[name], second.tensors[name])]
    atoms = [
        (first.tensors[name] != second.tensors[name]).any(-1).float().mean().item() for name in names if "atoms" in name
    ]
    pairs = [pair for kv in first.info.errors for pair in zip(_losses(first, kv), _losses(second, kv), strict=True)]
    return {
        "tensors": len(names),
        "differ": len(differ),
        "sha256": [_digest(each) for each in (first, second)],
        "atoms_that_differ": sum(atoms) / len(atoms),
        "loss_apart": sum(abs(a - b) / max(a, b) for a, b in pairs) / max(len(pairs), 1),
    }


def _losses(dictionary: Dictionary, kv: str) -> list[float]:
    return [loss for losses in dictionary.info.errors[kv].values() for loss in losses]


def _digest(dictionary: Dictionary) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(dictionary.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rows(runs: Sequence[Trained], gpus: int, model: str) -> list[tuple[Row, str]]:
    """What is recorded of three trainings, twice on one GPU and then on all, each with a line of words."""
    first, alone, shared = runs
    itself, across = differences(first.file, alone.file), differences(alone.file, shared.file)
    case = {"model": model, "gpus": gpus, "settings": " ".join(SETTINGS), "first_seconds": first.seconds}
    times = {"reading": shared.reading, "learning": shared.learning}
    times |= {"peer_reading": alone.reading, "peer_learning": alone.learning}
    words = (
        f"training on {gpus}: {shared.seconds:.1f} s (reading {shared.reading:.1f}, learning {shared.learning:.1f}), "
        f"on one {alone.seconds:.1f} s (reading {alone.reading:.1f}, learning {alone.learning:.1f})"
    )
    out: list[tuple[Row, str]] = [((case | times, "train_seconds", shared.seconds, "one GPU", alone.seconds), words)]
    for metric in ("differ", "atoms_that_differ", "loss_apart"):
        name = {"differ": "tensors_that_differ"}.get(metric, metric)
        words = f"{name}, {gpus} GPUs against one: {across[metric]:.4g}; one GPU against itself: {itself[metric]:.4g}"
        at = case | {"tensors": across["tensors"], "sha256": [*itself["sha256"], across["sha256"][1]]}
        out.append(((at, name, across[metric], "one GPU from itself", itself[metric]), words))
    return out
