"""The command `vllm-lexico`: make dictionaries, look at them and share them, and evaluate what caches cost.

A subcommand is a module here whose `add(commands)` adds its parser and names its `run(arguments) -> int | None`, an
exit status or None for 0; COMMANDS lists them.
"""

import argparse
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vllm_lexico import __version__
from vllm_lexico.cli import check, inspect, push, train
from vllm_lexico.cli import eval as evaluate
from vllm_lexico.dictionary.names import printable

COMMANDS: tuple[Callable[[Any], None], ...] = (
    check.add,
    train.add,
    inspect.add,
    evaluate.add,
    push.add,
)

EXAMPLES = """examples:
  vllm-lexico check Qwen/Qwen2.5-7B-Instruct
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct
  vllm-lexico inspect ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors
  vllm-lexico eval Qwen/Qwen2.5-7B-Instruct --data data --out results
  vllm-lexico push ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors me/qwen2.5-7b-lexico

vllm-lexico COMMAND --help has more examples and every option."""


class _Parser(argparse.ArgumentParser):
    """Repeats nothing of what was typed that a terminal might obey."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Terminated(BaseException):  # like KeyboardInterrupt, not to be caught by those who handle errors
    """SIGTERM has come."""


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0; 1 where `check` says no; 2 when the user has to change something; 130 when interrupted, 143
        when terminated, 141 when the output's reader went away before the work was done.
    """
    parser = _Parser(
        prog="vllm-lexico",
        description="Dictionaries for the sparsely coded KV cache of vllm-lexico, and what it costs a model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may have what the terminal's encoding has not
    arguments = parser.parse_args(argv)
    try:
        with _sigterm_raises():
            return arguments.run(arguments) or 0
    except BrokenPipeError:  # the reader of our output has seen enough, as in `vllm-lexico inspect FILE | head`
        sys.stdout = None
        if getattr(arguments, "only_prints", False) or getattr(arguments, "report", None):
            return 0
        print(f"vllm-lexico: nobody reads what it prints any more; {arguments.after_interrupt}", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:  # OSError: what transformers and the hub raise for a model that is not there
        print(f"vllm-lexico: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vllm-lexico: interrupted; {arguments.after_interrupt}", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        print(f"vllm-lexico: terminated; {arguments.after_interrupt}", file=sys.stderr)
        return 128 + signal.SIGTERM


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: files are closed, processes that it started end too."""

    def end(*_: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
