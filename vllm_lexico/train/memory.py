"""What to set where memory is too small for a training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

REMEDIES = {
    "loading the model": "free some, as other processes' on that GPU, take a smaller --dtype, or another --device",
    "reading": "lower --sequence-tokens, as to 1024, or raise --rounds, as to 8: a round then holds fewer vectors",
    "learning": "raise --rounds, as to 8: a round then holds fewer vectors; or lower --atoms, as to 2048",
}


@contextmanager
def words_for_memory(doing: str, device: str) -> Iterator[None]:
    """Say what to set where what is done inside takes more memory than there is.

    Args:
        doing: one of REMEDIES.
        device: where it is done.

    Raises:
        ValueError: in place of torch's and Python's own errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(_sentence(doing, device)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says on a CPU
            raise
        raise ValueError(_sentence(doing, device)) from error


def _sentence(doing: str, device: str) -> str:
    there = "memory"
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        there = f"memory on {device}, of which {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free now"
    return f"{doing} takes more than there is {there}; {REMEDIES[doing]}; finished rounds are kept"
