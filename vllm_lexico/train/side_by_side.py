"""Work on several learners at a time, on a CPU: a thread for each, where threads within an operation gain little."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def side_by_side(
    work: Callable[..., Generator[None, None, Result]], items: Sequence[tuple[Any, ...]], device: torch.device
) -> list[Result]:
    """Run `work(*item)` to its end for all items: on a CPU as many at a time as torch has threads, else in turn.

    An operation of learning is so small that two threads finish it hardly sooner than one, and wait for each other
    where the processor is busy. Each item is computed by one thread, so that the outcome does not depend on how many
    there are.

    Args:
        work: yields between steps, which is where an interrupted run ends.
        items: arguments of each call.
        device: where the work is done.

    Returns:
        What the work returns, in the order of the items.

    Raises:
        Exception: what the work raises first; the rest is then ended at its next step.
    """
    threads = torch.get_num_threads()
    ended = Event()

    def run(item: tuple[Any, ...]) -> Result:
        steps = work(*item)
        while not ended.is_set():
            try:
                next(steps)
            except StopIteration as end:
                return end.value
        raise InterruptedError("work beside this has failed, or all of it was interrupted")

    if device.type != "cpu" or min(threads, len(items)) <= 1:
        return [run(item) for item in items]
    torch.set_num_threads(1)  # what threads that start now begin with
    try:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            futures = [pool.submit(run, item) for item in items]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C, too
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
