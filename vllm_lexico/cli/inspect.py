"""`vllm-lexico inspect`: what a dictionary file is, what it was made from and what it loses, in words and a picture."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.names import train_command
from vllm_lexico.dictionary.picture import plot_dictionary
from vllm_lexico.dictionary.usage import dead_atoms, effective_atoms

EXAMPLES = """examples:
  vllm-lexico inspect ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors
      a table, and a picture beside the file
  vllm-lexico inspect my-finetune.safetensors --plot losses.png
      the picture somewhere else
  vllm-lexico inspect my-finetune.safetensors --no-plot
      only the table"""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "inspect",
        help="say what a dictionary file is, what it was made from, and what it loses",
        description="Say what a dictionary file is, what it was made from and what it loses; check that it is whole. "
        "Draws a picture of the losses and of how often atoms are used.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a dictionary file")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument("--plot", metavar="PATH", type=Path, help="the picture to write (default: FILE as .png)")
    picture.add_argument("--no-plot", action="store_true", help="write no picture")
    parser.set_defaults(run=run, after_interrupt="nothing was changed")


def run(arguments: argparse.Namespace) -> None:
    """Print the facts and the table, then write the picture.

    A picture that was asked for by name and cannot be had is an error; the usual one is only missed in a note.
    """
    dictionary = load_dictionary(arguments.file)
    _print_facts(dictionary)
    _print_layers(dictionary)
    if arguments.plot:
        plot_dictionary(dictionary, arguments.plot)
        print(f"\npicture: {arguments.plot}")
    elif not arguments.no_plot:
        draw(dictionary, arguments.file.with_suffix(".png"))


def draw(dictionary: Dictionary, path: Path) -> None:
    """Write the picture and say where; where it cannot be written, say why on stderr and go on."""
    try:
        plot_dictionary(dictionary, path)
    except (ValueError, OSError) as error:
        print(f"vllm-lexico: no picture: {error}", file=sys.stderr)
    else:
        print(f"picture: {path}")


def _print_facts(dictionary: Dictionary) -> None:
    info = dictionary.info
    shape = info.fingerprint
    print(f"dictionary of {info.model_name}")
    heads = f"{shape.num_kv_heads} KV heads of {shape.head_dim}"
    print(f"  model      {shape.model_type}, {shape.num_layers} layers, {heads}")
    print(f"  rope       {shape.rope}")
    whose = "layer" if dictionary.shared else "KV head"
    print(f"  atoms      {info.atoms} a {whose} for keys and as many for values, {info.atom_bits} bits a number")
    print(f"  trained    at {info.sparsity} atoms a vector on {info.vectors_seen} vectors of {info.tokens_seen} tokens")
    print(f"  data       {info.data}")
    print(f"  made by    {info.version}, seed {info.seed}; make one of your own: {train_command(info.model_name)}")
    for kv in KV:
        usage = dictionary.usage(kv)
        if usage is not None:
            effective, dead = effective_atoms(usage), dead_atoms(usage)
            print(
                f"  {kv + 's':<9}  use {effective.mean():.0f} atoms effectively (exp of the entropy; the worst layer "
                f"{effective.min():.0f}); {dead.sum()} of {usage[:, 1:].numel()} atoms are dead"
            )


def _print_layers(dictionary: Dictionary) -> None:
    """The table: energy lost and, where the file knows it, use of atoms, layer by layer."""
    columns = []  # title, a value a layer, digits after the point
    for kv, of_part in dictionary.info.errors.items():
        columns += [(f"{kv} {sparsity}", lost, 4) for sparsity, lost in of_part.items()]
    headings = ["energy lost on held-out text by atoms a vector"] if columns else []
    used = [(kv, usage) for kv in KV if (usage := dictionary.usage(kv)) is not None]
    for kv, usage in used:
        columns += [
            (f"{kv} eff.", effective_atoms(usage).tolist(), 0),
            (f"{kv} dead", dead_atoms(usage).tolist(), 0),
        ]
    headings += ["effective and dead atoms"] if used else []
    if not columns:
        return
    print(f"\n{'; '.join(headings)}")
    print("layer  " + "  ".join(f"{title:>10}" for title, _, _ in columns))
    for layer in range(dictionary.info.fingerprint.num_layers):
        print(f"{layer:5d}  " + "  ".join(f"{values[layer]:10.{digits}f}" for _, values, digits in columns))
    print(" mean  " + "  ".join(f"{sum(values) / len(values):10.{digits}f}" for _, values, digits in columns))
