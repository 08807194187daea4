"""The setting `"dictionary": "train"`: a dictionary that is missing is trained when the engine first starts."""

import logging
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lexico_kernels.files import cache_folder

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.names import file_name, train_command
from vllm_lexico.dictionary.search import DictionaryNotFoundError, find_dictionary
from vllm_lexico.processes import without_ranks

logger = logging.getLogger("vllm.lexico")

END_SECONDS = 40.0  # in which a training that is told to end has ended by itself


def find_or_train(model_name: str, fingerprint: ModelFingerprint, overrides: str | None = "") -> Path:
    """Path of a model's dictionary, found as without a setting, else trained into the user's cache.

    Ranks and engines that start together train once: the others wait for it. Training is a process of its own, so that
    its GPU memory is free again when vLLM measures what there is.

    Args:
        model_name: as vLLM was given it.
        fingerprint: the model's.
        overrides: of its configuration, see `train_command`.

    Raises:
        ValueError: training failed, or cannot be told the overrides; the command to run by hand is named.
    """
    try:
        return find_dictionary(None, model_name, fingerprint, overrides)
    except DictionaryNotFoundError as missing:
        if overrides is None:
            raise
        reason = missing
    own_rope = not overrides and fingerprint.short_context is None
    out = cache_folder() / file_name(model_name, "" if own_rope else fingerprint.rope)
    with _alone(out, model_name):
        try:
            return find_dictionary(None, model_name, fingerprint, overrides)
        except DictionaryNotFoundError:
            if out.exists():
                raise ValueError(
                    f"{reason}. It was not trained now because {out} is there and of no use to this model; move it "
                    f"away, or name the dictionary that you want"
                ) from None
            _train(model_name, out, overrides, fingerprint.short_context)
    return out


@contextmanager
def _alone(out: Path, model_name: str) -> Iterator[None]:
    """Hold the lock of a dictionary file; it goes with the process, however that ends."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".lock").touch()
    except OSError as error:
        raise ValueError(
            f"the dictionary of {model_name} cannot be kept in {out.parent} ({error.strerror}); set XDG_CACHE_HOME to "
            "a folder that can be written to, or name a dictionary that is there"
        ) from error
    lock = FileLock(out.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process, which trains the dictionary of %s", model_name)
        while not lock.is_locked:
            _check_wanted()
            with suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def _train(model_name: str, out: Path, overrides: str, max_model_len: int | None) -> None:
    logger.info(
        "there is no dictionary for %s, so one is trained now, once (some minutes on a GPU). If interrupted, "
        "start again: finished rounds are kept",
        model_name,
    )
    started = time.monotonic()
    status = _run(_command(model_name, out, overrides, max_model_len))
    if status or not out.is_file():
        raise ValueError(
            f"training a dictionary for {model_name} failed with status {status}; the reason is above. Start again "
            f"when it is fixed, name a dictionary that exists, or train by hand: "
            f"{train_command(model_name, overrides, max_model_len)}"
        )
    logger.info("trained the dictionary of %s in %.0f s: %s", model_name, time.monotonic() - started, out)


def _run(command: list[str]) -> int:
    """Exit status of a training; it does not outlive this process, nor the one that wants its dictionary."""
    # Its standard input is a pipe whose other end closes when this process ends, however that is: `--end-with-parent`.
    training = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, env=without_ranks())  # 2: our stderr
    try:
        while training.poll() is None:
            _check_wanted()
            with suppress(subprocess.TimeoutExpired):
                training.wait(1)
        return training.returncode
    finally:  # whatever ends the wait, a signal's exception too
        if training.poll() is None:
            logger.warning("training is ended; finished rounds are kept, and the next start goes on from them")
            training.terminate()
            with suppress(subprocess.TimeoutExpired):
                training.wait(END_SECONDS)
            training.kill()
        training.communicate()


def _check_wanted() -> None:
    """vLLM's engine, a process of its own, takes no notice of SIGTERM while it starts: see whether its parent lives.

    Raises:
        ValueError: the process that started this one is gone.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise ValueError("vLLM was ended while a dictionary was trained; start it again to go on")


def _command(model_name: str, out: Path, overrides: str, max_model_len: int | None) -> list[str]:
    """-P: the current folder stays off the path of Python, lest a `kernels` or `vllm_lexico` there be imported."""
    command = [sys.executable, "-P", "-m", "vllm_lexico.cli", "train", model_name, "--out", str(out)]
    if overrides:
        command += ["--hf-overrides", overrides]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    return [*command, "--end-with-parent"]
