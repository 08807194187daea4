"""The setting `"dictionary": "train"`: a dictionary that is missing is trained when the engine first starts."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lexico_kernels.files import cache_folder

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.names import file_name, train_command
from vllm_lexico.dictionary.search import DictionaryNotFoundError, find_dictionary

logger = logging.getLogger("vllm.lexico")


def find_or_train(model_name: str, fingerprint: ModelFingerprint) -> Path:
    """Path of a model's dictionary, found as without a setting, else trained into the user's cache.

    Ranks and engines that start together train once: the others wait for it. Training is a process of its own, so that
    its GPU memory is free again when vLLM measures what there is. ValueError when training fails, with the command to
    run by hand.
    """
    try:
        return find_dictionary(None, model_name, fingerprint)
    except DictionaryNotFoundError as missing:
        reason = missing
    out = cache_folder() / file_name(model_name)
    with _alone(out, model_name):
        try:
            return find_dictionary(None, model_name, fingerprint)
        except DictionaryNotFoundError:
            if out.exists():
                raise ValueError(
                    f"{reason}. It was not trained now because {out} is there and of no use to this model; move it "
                    f"away, or name the dictionary that you want"
                ) from None
            _train(model_name, out)
    return out


@contextmanager
def _alone(out: Path, model_name: str) -> Iterator[None]:
    """Hold the lock of a dictionary file; it goes with the process, however that ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process, which trains the dictionary of %s", model_name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _train(model_name: str, out: Path) -> None:
    logger.info(
        "there is no dictionary for %s, so one is trained now, once (some minutes on a GPU). Should vLLM give up "
        "waiting for its engine, start again: finished rounds are kept. VLLM_ENGINE_READY_TIMEOUT_S has it wait longer",
        model_name,
    )
    started = time.monotonic()
    status = subprocess.run(_command(model_name, out), stdin=subprocess.DEVNULL, stdout=2).returncode  # 2: our stderr
    if status or not out.is_file():
        raise ValueError(
            f"training a dictionary for {model_name} failed with status {status}; the reason is above. Start again "
            f"when it is fixed, name a dictionary that exists, or train by hand: {train_command(model_name)}"
        )
    logger.info("trained the dictionary of %s in %.0f s: %s", model_name, time.monotonic() - started, out)


def _command(model_name: str, out: Path) -> list[str]:
    """-P: the current folder stays off the path of Python, lest a `kernels` or `vllm_lexico` there be imported."""
    return [sys.executable, "-P", "-m", "vllm_lexico.cli", "train", model_name, "--out", str(out)]
