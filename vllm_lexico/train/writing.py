"""The text that a model writes itself under vLLM, kept with the run; says in one line where vLLM cannot."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_lexico.processes import stop, without_ranks
from vllm_lexico.train.own_text import join
from vllm_lexico.train.progress import Progress
from vllm_lexico.train.state import Kept, RunFolder
from vllm_lexico.train.vllm_writer import WriterJob

TEXT = "text"  # name of the state that holds it
LAST_WORDS = 200  # letters of what a process said that ended without a reason
WRITERS = ("auto", "vllm", "transformers")


class WriterError(Exception):
    """vLLM wrote nothing; says why in one line."""


def own_text(
    writer: str,
    job: WriterJob,
    run: RunFolder,
    device: str,
    progress: Progress,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, Any] | None:
    """Have vLLM write the text of a whole run, if it can, and keep it with the run.

    Args:
        writer: one of WRITERS.
        job: what is wanted; its `out` is not used.
        run: where it is kept. What is there already is not written again, and a run whose first rounds were learned
            from what transformers wrote goes on with that.
        device: "cuda:1" and so on, or "cpu".
        progress: of the run, with a stage "write".
        meanwhile: what to do here while vLLM starts, once, if it does; what it raises ends vLLM too.

    Returns:
        What was done, for the dictionary to say; None where transformers is to write.

    Raises:
        ValueError: vLLM is asked for and cannot.
    """
    kept = run.load(TEXT)
    if kept is not None:
        progress.skip("write", 1)
        return kept.facts
    if writer == "transformers" or (writer == "auto" and (not has_vllm() or run.has_state())):
        return None
    try:
        with progress.stage("write"):
            tensors, facts = _write_or_again(job, device, progress, meanwhile)
    except WriterError as error:
        if writer == "vllm":
            raise ValueError(
                f"--writer vllm: vLLM cannot write text with {job.model} ({error}); correct that, leave --writer out, "
                f"or give --data"
            ) from error
        progress.say(f"vLLM cannot write the text ({error}), so transformers does, which takes longer")
        return None
    run.save(TEXT, Kept(tensors, facts))
    return facts


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return find_spec("vllm") is not None


def written_rows(run: RunFolder, length: int) -> torch.Tensor | None:
    """The text of a run as int64 [rows, length] token ids; None where transformers writes it."""
    kept = run.load(TEXT)
    return None if kept is None else join(kept.tensors["ids"], length)


def _write_or_again(
    job: WriterJob, device: str, progress: Progress, meanwhile: Callable[[], None] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `write`; on a GPU a second time without CUDA graphs: some models have none, and others use its memory too."""
    try:
        return write(job, device, progress, meanwhile)
    except WriterError as error:
        if job.device == "cpu":
            raise
        progress.say(f"vLLM could not write the text ({error}); it tries again without CUDA graphs")
    return write(replace(job, graphs=False), device, progress)


def write(
    job: WriterJob, device: str, progress: Progress, meanwhile: Callable[[], None] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run `vllm_writer` in a process of its own.

    Args:
        job: what is wanted; its `out` is not used.
        device: "cuda:1" and so on, or "cpu".
        progress: told how many tokens there are.
        meanwhile: done here once the process has started; until it is done, what the process says waits in its pipe.

    Returns:
        What it wrote, see `vllm_writer.save`, and what it says of it.

    Raises:
        WriterError: vLLM cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "text.safetensors", Path(folder) / "log.txt"
        WriterJob(**vars(job) | {"out": str(out)}).write(Path(folder) / "job.json")
        # -P: the folder that the user is in must not hide packages, as a checkout's `kernels` would.
        command = [sys.executable, "-P", "-m", "vllm_lexico.train.vllm_writer", f"{folder}/job.json"]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
                env=without_ranks() | _seen(device, job.gpus) | {"TMPDIR": folder},  # which vLLM fills
            )  # fmt: skip
            try:
                if meanwhile is not None:
                    meanwhile()
                facts = _follow(process, progress)
            finally:  # Ctrl-C and the like, too; its memory is free when this returns
                stop(process)
        if facts is None:
            raise WriterError(_last_words(log) or f"its process ended with status {process.returncode}")
        return load_file(out), facts


def _follow(process: subprocess.Popen, progress: Progress) -> dict[str, Any] | None:
    """Read what the process says until it ends; what it did, or None where it ended without a word."""
    facts, before = None, 0
    assert process.stdout is not None
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:  # printed by something that was imported
            continue
        if "error" in said:
            raise WriterError(said["error"])
        if "tokens" in said:
            progress.advance(said["tokens"] - before)
            before = said["tokens"]
        if "wrote" in said:
            facts = said["wrote"]
            progress.say(
                f"vLLM started in {said['start_seconds']:.0f} s and wrote {sum(facts['tokens'].values()):,} tokens in "
                f"{said['write_seconds']:.0f} s"
            )
    return facts


def _seen(device: str, gpus: int) -> dict[str, str]:
    """What to set so that the process sees some GPUs, or none where a CPU is asked for, all of whose threads it takes.

    device: "cuda:1" and so on, the first of `gpus`, or "cpu".
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in seen.split(",") if name]
    first = int(number or 0)
    chosen = names[first : first + gpus] if names else map(str, range(first, first + gpus))
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:LAST_WORDS] if lines else ""
