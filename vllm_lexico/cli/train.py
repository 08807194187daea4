"""`vllm-lexico train`: make the dictionary of a model."""

import argparse
from pathlib import Path
from typing import Any

from lexico_kernels.files import cache_folder

from vllm_lexico.cli.inspect import draw
from vllm_lexico.dictionary.atoms import ATOM_BITS
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.run import TrainSettings, train_dictionary

EXAMPLES = """examples:
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct
      from text that the model writes itself, into the user's cache, where vLLM finds it
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --data books.jsonl.xz code/ notes.txt
      from your own text, each of the three counting the same
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --data HuggingFaceFW/fineweb:sample-10BT notes.txt
      half of it from a dataset on the Hugging Face hub, read as a stream (pip install datasets)
  vllm-lexico train ./my-finetune --name me/my-finetune --out my-finetune.safetensors
      serve with it: --additional-config '{"lexico": {"dictionary": "my-finetune.safetensors"}}'

A run that was interrupted goes on from its last finished round when the same command is given again."""


def add(commands: Any) -> None:
    """Add the parser."""
    default = TrainSettings()
    parser = commands.add_parser(
        "train",
        help="make the dictionary of a model",
        description="Make the dictionary of a model: run it over text and learn atoms from its keys and values.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or folder of a transformers model")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help=".txt, .jsonl or .jsonl.xz (field text) files, folders of them, or Hugging Face datasets (org/name, "
        "org/name:config or org/name:config:split), mixed evenly (default: text that the model samples itself)",
    )
    learn = default.learn
    parser.add_argument("--atoms", type=int, default=learn.atoms, help="atoms a dictionary, up to 4096 (%(default)s)")
    parser.add_argument(
        "--atom-bits", type=int, choices=ATOM_BITS, default=learn.atom_bits, help="stored bits (%(default)s)"
    )
    parser.add_argument(
        "--shared", action="store_true", help="one dictionary for all KV heads of a layer instead of one for each"
    )
    parser.add_argument(
        "--key-metric",
        type=float,
        default=learn.key_metric,
        help="how far errors of keys are weighed by the queries they meet, 0 (not at all) to 1 (%(default)s)",
    )
    parser.add_argument("--sparsity", type=int, default=learn.sparsity, help="atoms a vector in training (%(default)s)")
    parser.add_argument(
        "--vectors", type=int, default=default.vectors, help="a layer, for keys and for values (%(default)s)"
    )
    parser.add_argument("--passes", type=int, default=default.passes, help="over the vectors (%(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=default.rounds,
        help="of reading and learning, at most or as many as memory asks for; the last half anneals (%(default)s)",
    )
    parser.add_argument(
        "--sequence-tokens", type=int, help="length of the texts read (2048 from --data, 1024 from the model itself)"
    )
    parser.add_argument("--out", type=Path, help=f"the file to write (default: in {cache_folder()})")
    parser.add_argument("--name", help="what the model is called when it is served (default: MODEL)")
    parser.add_argument(
        "--device",
        help="cuda for all GPUs, which share the layers, cuda:1 for one, or cpu (default: cuda if there is one)",
    )
    parser.add_argument(
        "--dtype", default=default.dtype, choices=("auto", "bfloat16", "float16", "float32"), help="of the model"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything random (%(default)s)")
    parser.set_defaults(run=run, after_interrupt="the same command goes on from the last finished round")


def run(arguments: argparse.Namespace) -> None:
    """Train, then draw the picture of what came of it."""
    learn = LearnSettings(
        atoms=arguments.atoms,
        atom_bits=arguments.atom_bits,
        shared=arguments.shared,
        sparsity=arguments.sparsity,
        key_metric=arguments.key_metric,
    )
    settings = TrainSettings(
        data=tuple(arguments.data),
        learn=learn,
        vectors=arguments.vectors,
        passes=arguments.passes,
        rounds=arguments.rounds,
        sequence_tokens=arguments.sequence_tokens,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    path = train_dictionary(arguments.model, settings, name=arguments.name, out=arguments.out, device=arguments.device)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB); look at it with: vllm-lexico inspect {path}")
    draw(load_dictionary(path), path.with_suffix(".png"))
