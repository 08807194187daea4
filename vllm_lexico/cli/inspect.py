"""`vllm-lexico inspect`: check a dictionary file, and show in words and a picture what it is and what it loses."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lexico_kernels.files import try_beside
from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.names import printable, train_command
from vllm_lexico.dictionary.picture import plot_dictionary
from vllm_lexico.dictionary.tensors import ASKED_SHARES
from vllm_lexico.dictionary.usage import dead_atoms, effective_atoms
from vllm_lexico.errors import either, refusal

PICTURES = (".png", ".pdf", ".svg", ".jpg")
EXAMPLES = """examples:
  vllm-lexico inspect ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors
      print the table and write the picture next to the file
  vllm-lexico inspect my-finetune.safetensors --plot losses.png
      write the picture somewhere else
  vllm-lexico inspect my-finetune.safetensors --no-plot
      print the table only"""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "inspect",
        help="check a dictionary file and show what it loses",
        description="Check that a dictionary file is intact, and show the model it belongs to, the data it was trained "
        "on and the share of energy that each layer loses. A picture shows the losses and how often atoms are used.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a dictionary file")
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument("--plot", metavar="PATH", type=Path, help="picture to write (default: FILE with suffix .png)")
    picture.add_argument("--no-plot", action="store_true", help="do not write a picture")
    parser.set_defaults(run=run, after_interrupt="nothing was changed", only_prints=True)


def run(arguments: argparse.Namespace) -> None:
    """Print the facts and the table, then write the picture.

    A picture that was asked for by name and cannot be had is an error; the usual one is only missed in a note.
    """
    if arguments.plot:
        check_picture(arguments.plot)
    dictionary = load_dictionary(arguments.file)
    _print_facts(dictionary)
    _print_layers(dictionary)
    if arguments.plot:
        plot_dictionary(dictionary, arguments.plot)
        print(f"\npicture: {arguments.plot}")
    elif not arguments.no_plot:
        draw(dictionary, arguments.file.with_suffix(".png"))


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is printed.

    Raises:
        ValueError: in one sentence.
    """
    if path.suffix.lower() not in PICTURES:
        raise ValueError(refusal("--plot", str(path), f"a file that ends with {either(PICTURES)}", "rename it"))
    try:
        try_beside(path)
    except OSError as error:
        allowed = "a place that can be written to"
        raise ValueError(refusal("--plot", str(path), allowed, "give another one")) from error


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
    whose = "layer" if dictionary.shared else "KV head"
    print(f"dictionary of {info.model_name}")
    print(f"  model      {shape.words()}")
    print(f"  rope       {shape.rope}")
    print(f"  atoms      {info.atoms} per {whose} for keys and as many for values, {info.atom_bits} bits per number")
    seen = f"{info.vectors_seen:,} vectors per layer, of {info.tokens_seen:,} tokens"
    print(f"  trained    at {info.sparsity} atoms per vector on {seen}")
    print(f"  data       {printable(info.data)}")
    print(f"  made by    {printable(info.version)}, seed {info.seed}")
    for name, words in info.recipe_words():
        print(f"  {name:<9}  {words}")
    print(f"  your own   {train_command(info.model_name)}")
    for kv in KV:
        usage = dictionary.usage(kv)
        if usage is not None:
            effective, dead = effective_atoms(usage), dead_atoms(usage)
            print(
                f"  {kv + 's':<9}  use {effective.mean():.0f} atoms effectively (exp of the entropy; the worst layer "
                f"{effective.min():.0f}); {dead.sum()} of {usage[:, 1:].numel()} atoms are dead"
            )


def _print_layers(dictionary: Dictionary) -> None:
    """Print the table: energy lost and, where the file knows it, use of atoms, per layer."""
    columns = []  # title, one value per layer, digits after the point
    for kv, of_kv in dictionary.info.errors.items():
        columns += [(f"{kv} {sparsity}", lost, 4) for sparsity, lost in of_kv.items()]
    headings = ["energy lost on held-out text, by atoms per vector"] if columns else []
    used = [(kv, usage) for kv in KV if (usage := dictionary.usage(kv)) is not None]
    for kv, usage in used:
        columns += [
            (f"{kv} eff.", effective_atoms(usage).tolist(), 0),
            (f"{kv} dead", dead_atoms(usage).tolist(), 0),
        ]
    headings += ["effective and dead atoms"] if used else []
    if (shares := dictionary.tensors.get(ASKED_SHARES)) is not None:
        columns.append(("asked", shares.mean(1).tolist(), 4))
        headings.append("share of tokens that are asked most")
    if not columns:
        return
    print(f"\n{'; '.join(headings)}")
    print("layer  " + "  ".join(f"{title:>10}" for title, _, _ in columns))
    for row, layer in enumerate(dictionary.info.fingerprint.layers):
        print(f"{layer:5d}  " + "  ".join(f"{values[row]:10.{digits}f}" for _, values, digits in columns))
    print(" mean  " + "  ".join(f"{sum(values) / len(values):10.{digits}f}" for _, values, digits in columns))
