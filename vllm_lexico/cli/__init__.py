"""The command `vllm-lexico`: make dictionaries, look at them and share them, and evaluate what caches cost.

A subcommand is a module here whose `add(commands)` adds its parser and names its `run(arguments) -> None`; COMMANDS
lists them.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from vllm_lexico import __version__
from vllm_lexico.cli import eval as evaluate
from vllm_lexico.cli import inspect, push, train

COMMANDS: tuple[Callable[[Any], None], ...] = (train.add, inspect.add, evaluate.add, push.add)

EXAMPLES = """examples:
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct
  vllm-lexico inspect ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors
  vllm-lexico eval Qwen/Qwen2.5-7B-Instruct --data data --out results
  vllm-lexico push ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors me/qwen2.5-7b-lexico

vllm-lexico COMMAND --help has more of them and every option."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 when the user has to change something, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="vllm-lexico",
        description="Dictionaries for the sparsely coded KV cache of vllm-lexico, and what it costs a model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # the reader of our output has seen enough, as in `vllm-lexico inspect FILE | head`
        sys.stdout = None
        return 0
    except (ValueError, OSError) as error:  # OSError: what transformers and the hub raise for a model that is not there
        print(f"vllm-lexico: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vllm-lexico: interrupted; {arguments.after_interrupt}", file=sys.stderr)
        return 130
    return 0
