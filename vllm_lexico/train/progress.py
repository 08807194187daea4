"""How far a training is: one bar over the whole run with the time that is left; lines now and then where it is logged.

A run is a list of stages of known work. How long a unit of work takes is told by the last stage of its kind; before
there was one, by a guess that the stage came with. So the time left is measured as soon as it can be.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm.auto import tqdm

LOG_SECONDS = 30.0  # between two lines of a log
DRAW_SECONDS = 0.3  # between two drawings of the bar
LEAST_SHARE = 0.1  # of a stage that has to be done before its own pace is believed
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {postfix}"


@dataclass
class Stage:
    """A stretch of the run.

    Args:
        kind: stages of one kind go at one pace.
        words: what is done, for people.
        work: how much, in any unit of the kind.
        guess: seconds for a unit, until one was measured.
    """

    kind: str
    words: str
    work: float
    guess: float
    done: float = 0.0
    seconds: float = 0.0
    ended: bool = False


@dataclass
class Progress:
    """A run's progress.

    Args:
        stages: in order; those that turn out not to be needed are `skip`ped.
        shown: whether anything is shown.
        verbose: whether details are told too.
        started: `time.time()` at the start of the run, which may be before this process's.
        clock: seconds.
    """

    stages: list[Stage] = field(default_factory=list)
    shown: bool = True
    verbose: bool = False
    started: float = field(default_factory=time.time)
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._share = 0.0  # shown last: it never falls
        self._logged = self._drawn = self._began = self.clock()
        self._current: Stage | None = None
        self._bar: tqdm | None = None
        if self.shown and self.terminal:
            self._bar = tqdm(total=100.0, bar_format=BAR, leave=False, file=sys.stderr, dynamic_ncols=True)
            self._bar.start_t -= self.clock() - self.started  # what went before counts

    @contextmanager
    def stage(self, kind: str) -> Iterator[Stage]:
        """The next stage of a kind is under way; `done` of what it gives is to be counted up by `advance`."""
        stage = next(stage for stage in self.stages if stage.kind == kind and not stage.ended)
        began = self.clock()
        self._began, self._current = began, stage
        self._show(log=self.shown and not self.terminal)
        try:
            yield stage
        finally:
            self._current = None
        stage.seconds, stage.ended = self.clock() - began, True
        stage.done = stage.work
        self._show()

    def advance(self, work: float) -> None:
        """More of the stage under way is done."""
        if self._current is not None:
            self._current.done = min(self._current.work, self._current.done + work)
            self._current.seconds = self.clock() - self._began
        self._show(log=not self.terminal and self.clock() - self._logged >= LOG_SECONDS)

    def plan(self, stages: list[Stage]) -> None:
        """What comes from here on, in place of what was thought before."""
        self.stages = [stage for stage in self.stages if stage.ended] + stages

    def skip(self, kind: str, count: int) -> None:
        """So many of the next stages of a kind are not needed."""
        for stage in [stage for stage in self.stages if stage.kind == kind and not stage.ended][:count]:
            self.stages.remove(stage)

    def left(self) -> float:
        """Seconds that the rest will take."""
        return sum((stage.work - stage.done) * self._pace(stage) for stage in self.stages if not stage.ended)

    def share(self) -> float:
        """Of the run that is done, 0 to 1; it never falls."""
        elapsed, left = self.clock() - self.started, self.left()
        self._share = max(self._share, elapsed / (elapsed + left) if elapsed + left > 0 else 0.0)
        return self._share

    def say(self, words: str, *, detail: bool = False) -> None:
        """Print a line on stdout, above the bar. detail: only where details are wanted."""
        if self.shown and (self.verbose or not detail):
            tqdm.write(words)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _pace(self, stage: Stage) -> float:
        """Seconds for a unit of its work."""
        if stage.done >= LEAST_SHARE * stage.work:
            return stage.seconds / max(stage.done, 1e-9)
        ended = [other for other in self.stages if other.kind == stage.kind and other.ended]
        return ended[-1].seconds / max(ended[-1].work, 1e-9) if ended else stage.guess

    def _show(self, *, log: bool = False) -> None:
        if not self.shown:
            return
        share, words = self.share(), self._current.words if self._current is not None else "done with this step"
        left = f"about {in_words(self.left())} left"
        if self._bar is not None:
            if self._current is not None and self.clock() - self._drawn < DRAW_SECONDS:
                return
            self._drawn = self.clock()
            self._bar.set_description_str(words, refresh=False)
            self._bar.set_postfix_str(left, refresh=False)
            self._bar.n = round(100 * share, 1)
            self._bar.refresh()
        elif log:
            self._logged = self.clock()
            elapsed = in_words(self.clock() - self.started)
            print(f"{100 * share:3.0f} %  {words}; {elapsed} gone, {left}", file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """ "40 s", "3 min", "2 h 5 min": as precise as anybody wants to know."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
