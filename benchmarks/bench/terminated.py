"""A benchmark that is terminated, as `timeout` does it, ends what it has started and writes what it has measured."""

import signal
import sys


def end_orderly() -> None:
    """Have SIGTERM end this process through every `finally`, as Ctrl-C does, with the status that shells expect."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
