"""How far an evaluation is: a bar on a terminal; elsewhere a line at each step, and every half minute between them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

from tqdm import tqdm

from vllm_lexico.train.progress import LOG_SECONDS, in_words


class Position(NamedTuple):
    """Where a running cache is.

    step: the cache and its task, in words.
    sequences: of the task, how many of how many; empty before its first task.
    """

    step: str
    sequences: str = ""

    def __str__(self) -> str:
        return f"{self.step} {self.sequences}".strip()


class Bar:
    """Shows on stderr how many results are finished, and where the running caches are.

    Args:
        total: results that are asked for.
        kept: of these, what was finished before.
        clock: seconds.
    """

    def __init__(self, total: int, kept: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.kept, self.done, self.clock = total, kept, kept, clock
        self._began = self._logged = clock()
        self._bar = tqdm(total=total, initial=kept, unit="result", smoothing=0) if sys.stderr.isatty() else None
        self._shown: object = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, finished: int) -> None:
        """So many more results are finished; `show` shows them."""
        self.done += finished
        if self._bar is not None:
            self._bar.update(finished)

    def show(self, running: Sequence[Position]) -> None:
        """Show where the running caches are, if that is due."""
        words = "; ".join(map(str, running))
        if self._bar is None:
            step = self.done, [position.step for position in running]
            if step != self._shown or self.clock() - self._logged >= LOG_SECONDS:
                self._shown, self._logged = step, self.clock()
                print(self._line(words), file=sys.stderr, flush=True)
        elif words != self._shown:
            self._bar.set_postfix_str(words)
            self._shown = words
        else:
            self._bar.refresh()  # the clock

    def _line(self, words: str) -> str:
        elapsed, finished = self.clock() - self._began, self.done - self.kept
        line = "; ".join(filter(None, [f"{self.done} of {self.total} results", words, f"{in_words(elapsed)} gone"]))
        left = elapsed / finished * (self.total - self.done) if finished and words else 0
        return f"{line}, about {in_words(left)} left" if left else line
