"""The command `vllm-lexico`: make dictionaries and look at them.

A subcommand is a function that adds its parser and names its `run(arguments) -> None`; COMMANDS lists them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_lexico.dictionary import ATOM_BITS, cache_folder, load_dictionary, train_command
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.run import TrainSettings, train_dictionary

TRAIN_EXAMPLES = """examples:
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct
      from text that the model writes itself, into the user's cache, where vLLM finds it
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --data books.jsonl.xz code/ notes.txt
      from your own text, each of the three counting the same
  vllm-lexico train ./my-finetune --name me/my-finetune --out my-finetune.safetensors
      serve with it: --additional-config '{"lexico": {"dictionary": "my-finetune.safetensors"}}'

A run that was interrupted goes on from its last finished layer when the same command is given again."""


def _add_train(commands: Any) -> None:
    default = TrainSettings()
    parser = commands.add_parser(
        "train",
        help="make the dictionary of a model",
        description="Make the dictionary of a model: run it over text and learn atoms from its keys and values.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or folder of a transformers model")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".txt, .jsonl or .jsonl.xz (field text) files or folders of them, mixed evenly "
        "(default: text that the model samples itself)",
    )
    learn = default.learn
    parser.add_argument("--atoms", type=int, default=learn.atoms, help="atoms a dictionary, up to 4096 (%(default)s)")
    parser.add_argument(
        "--atom-bits", type=int, choices=ATOM_BITS, default=learn.atom_bits, help="stored bits (%(default)s)"
    )
    parser.add_argument("--sparsity", type=int, default=learn.sparsity, help="atoms a vector in training (%(default)s)")
    parser.add_argument(
        "--vectors", type=int, default=default.vectors, help="a layer, for keys and for values (%(default)s)"
    )
    parser.add_argument(
        "--sequence-tokens", type=int, default=default.sequence_tokens, help="length of the texts read (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=learn.epochs, help="passes over the vectors (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"the file to write (default: in {cache_folder()})")
    parser.add_argument("--name", help="what the model is called when it is served (default: MODEL)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", default=default.dtype, choices=("auto", "bfloat16", "float16", "float32"), help="of the model"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything random (%(default)s)")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    learn = LearnSettings(
        atoms=arguments.atoms, atom_bits=arguments.atom_bits, sparsity=arguments.sparsity, epochs=arguments.epochs
    )
    settings = TrainSettings(
        data=tuple(arguments.data),
        learn=learn,
        vectors=arguments.vectors,
        sequence_tokens=arguments.sequence_tokens,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    path = train_dictionary(arguments.model, settings, name=arguments.name, out=arguments.out, device=arguments.device)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB); look at it with: vllm-lexico inspect {path}")


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a dictionary file is, what it was made from, and what it loses",
        description="Say what a dictionary file is, what it was made from and what it loses; check that it is whole.",
        epilog="example:\n  vllm-lexico inspect ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a dictionary file")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    info = load_dictionary(arguments.file).info
    shape = info.fingerprint
    print(f"dictionary of {info.model_name}")
    heads = f"{shape.num_kv_heads} KV heads of {shape.head_dim}"
    print(f"  model      {shape.model_type}, {shape.num_layers} layers, {heads}")
    print(f"  rope       {shape.rope}")
    print(f"  atoms      {info.atoms} a layer for keys and as many for values, {info.atom_bits} bits a number")
    print(f"  trained    at {info.sparsity} atoms a vector on {info.vectors_seen} vectors of {info.tokens_seen} tokens")
    print(f"  data       {info.data}")
    print(f"  made by    {info.version}, seed {info.seed}; make one of your own: {train_command(info.model_name)}")
    columns = [(part, sparsity) for part, of_part in info.errors.items() for sparsity in of_part]
    if not columns:
        return
    print("\nenergy lost on held-out text, by atoms a vector")
    print("layer  " + "  ".join(f"{part + ' ' + sparsity:>9}" for part, sparsity in columns))
    table = [info.errors[part][sparsity] for part, sparsity in columns]
    for layer in range(shape.num_layers):
        print(f"{layer:5d}  " + "  ".join(f"{column[layer]:9.4f}" for column in table))
    print(" mean  " + "  ".join(f"{sum(column) / len(column):9.4f}" for column in table))


COMMANDS: tuple[Callable[[Any], None], ...] = (_add_train, _add_inspect)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 when the user has to change something, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="vllm-lexico",
        description="Dictionaries for the sparsely coded KV cache of vllm-lexico.",
        epilog="vllm-lexico COMMAND --help has examples.",
    )
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
        print("vllm-lexico: interrupted; the same command goes on from the last finished layer", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
