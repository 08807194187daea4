"""`vllm-lexico train`: make the dictionary of a model."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vllm_lexico.cli.inspect import draw
from vllm_lexico.dictionary.atoms import ATOM_BITS
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.names import printable
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.run import checked_devices, train_dictionary
from vllm_lexico.train.settings import ADAPTING, EFFORTS, Effort, TrainSettings, check
from vllm_lexico.train.writing import WRITERS

DESCRIPTION = """\
Make the dictionary of a model: run it over text and learn atoms from its keys and values.

On one H100, a model of 1.5B parameters takes two minutes with --data. Without, the model writes its text itself first:
under vLLM where it is installed, else with transformers, which takes nine minutes more. On a CPU less is learned, from
less text. Where only some layers' cache grows with the context, as in Gemma 3, gpt-oss and Qwen3-Next, these layers are
learned; of a model that also reads images, the language model. One bar shows how far the whole run is. A run that was
interrupted goes on from its last finished round when the same command is given again."""

EXAMPLES = """examples:
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct
      from text that the model writes itself, into the user's cache, where vLLM finds it
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --data books.jsonl.xz code/ notes.txt
      from your own text, each of the three counting the same
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --data HuggingFaceFW/fineweb:sample-10BT notes.txt
      half of it from a dataset on the Hugging Face hub, read as a stream (pip install datasets)
  vllm-lexico train Qwen/Qwen2.5-7B-Instruct --continue-from FILE --data my-texts/
      adapt a dictionary to your text, in a fraction of the time
  vllm-lexico train ./my-finetune --name me/my-finetune --out my-finetune.safetensors
      serve with it: --additional-config '{"lexico": {"dictionary": "my-finetune.safetensors"}}'"""

# What would do nothing beside other flags, and why.
WRITING = ("writer", "text_tokens", "package_text")
LEARNING = ("vectors", "passes", "sparsity", "key_metric")
IDLE = {
    "--continue-from": (("atoms", "atom_bits", "shared"), "whose file decides it"),
    "--data": (WRITING, "which is all that is read"),
    "--rounds 0": ((*WRITING, *LEARNING), "which learns nothing"),
    "--writer transformers": (("text_tokens",), "as it is for texts that vLLM writes"),
}

EXIT_SECONDS = 30.0  # after which a training whose parent is gone no longer waits for its current step


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "train",
        help="make the dictionary of a model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = TrainSettings()
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or folder of a transformers model")
    _add_reading(parser, default)
    _add_learning(parser, default)
    parser.add_argument("--out", type=Path, help="file to write (default: in XDG_CACHE_HOME or ~/.cache)")
    parser.add_argument("--name", help="name under which the model is served (default: MODEL)")
    parser.add_argument(
        "--device",
        help="cuda for all GPUs, which share the layers; cuda:1 for one; or cpu (default: cuda if there is one)",
    )
    parser.add_argument(
        "--dtype",
        default=default.dtype,
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the model (default: the checkpoint's own; on a CPU without bfloat16 arithmetic float32)",
    )
    parser.add_argument(
        "--hf-overrides",
        default=default.hf_overrides,
        metavar="JSON",
        help="changes of the model's configuration, those that it is served with: an object, as vLLM's flag takes it",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="longest sequence that is served, as vLLM's flag takes it; it matters to models with two sets of rotary "
        "factors, for short and for long contexts (default: the model's longest)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of everything random (%(default)s)")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell every layer's errors after each round")
    parser.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)  # for a first start
    parser.set_defaults(run=run, after_interrupt="the same command goes on from the last finished round")


def _add_reading(parser: argparse.ArgumentParser, default: TrainSettings) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text to learn from, sources mixed evenly: .txt, .jsonl or .jsonl.xz files (field text), folders of them, "
        "or Hugging Face datasets as org/name, org/name:config or org/name:config:split (default: text that the model "
        "samples itself)",
    )
    parser.add_argument(
        "--writer",
        choices=WRITERS,
        help="what has the model write its text where there is no --data (default: vLLM if it is installed and can)",
    )
    parser.add_argument(
        "--continue-from",
        default=default.continue_from,
        metavar="FILE",
        help="a dictionary to adapt, of a model of the same shape and rotary embedding; its atoms are where learning "
        "starts, and a few short rounds are enough",
    )
    parser.add_argument(
        "--vectors",
        type=int,
        help=f"training vectors per layer, for keys and values each ({_usual('vectors')})",
    )
    parser.add_argument(
        "--sequence-tokens",
        type=int,
        help="length of the texts read (default: 2048, on a CPU 1024, at most the model's longest)",
    )
    parser.add_argument(
        "--package-text",
        type=float,
        metavar="SHARE",
        help="share of the reading, without --data, that is real text: that of the package and the code of Python's "
        "standard library; 0 for the model's own alone (default: "
        f"{EFFORTS['cuda'].package_text})",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        help="length of the texts that vLLM has the model write, each written to the end (default: as long as they "
        f"come; on a CPU {EFFORTS['cpu'].text_tokens})",
    )


def _add_learning(parser: argparse.ArgumentParser, default: TrainSettings) -> None:
    learn = default.learn
    usual = f"{EFFORTS['cuda'].atoms} on a GPU, {EFFORTS['cpu'].atoms} on a CPU"
    parser.add_argument("--atoms", type=int, help=f"atoms per dictionary, 2 to 4096 (default: {usual})")
    parser.add_argument(
        "--atom-bits",
        type=int,
        choices=ATOM_BITS,
        help=f"bits per number of a stored atom (default: {learn.atom_bits})",
    )
    parser.add_argument(
        "--shared",
        action=argparse.BooleanOptionalAction,
        help="one dictionary for all KV heads of a layer instead of one for each (default: on a CPU)",
    )
    parser.add_argument(
        "--key-metric",
        type=float,
        help="how far errors of keys are weighted by the queries they meet, 0 (not at all) to 1 "
        f"(default: {learn.key_metric})",
    )
    parser.add_argument("--sparsity", type=int, help=f"atoms per vector while learning (default: {learn.sparsity})")
    parser.add_argument("--passes", type=int, help=f"how often each vector is learned from ({_usual('passes')})")
    parser.add_argument(
        "--rounds",
        type=int,
        help="rounds of reading and learning, of which the last half anneals; more are made where memory is short, "
        f"fewer where they gain nothing; 0 with --continue-from learns nothing and adds to FILE how often each head is "
        f"asked when the model repeats a text ({_usual('rounds')})",
    )


def _usual(name: str) -> str:
    """The defaults of a setting of `Effort`, in words."""
    on = {kind: (getattr(EFFORTS[kind], name), getattr(ADAPTING[kind], name)) for kind in ("cuda", "cpu")}
    words = {kind: f"{usual}, with --continue-from {adapting}" for kind, (usual, adapting) in on.items()}
    return f"default: {words['cuda']}; on a CPU {words['cpu']}"


def run(arguments: argparse.Namespace) -> None:
    """Train, then draw the picture of what came of it."""
    if arguments.end_with_parent:
        _end_with_parent()
    settings = settings_of(arguments)
    picture = other_picture(arguments.out)
    try:
        path = train_dictionary(
            arguments.model,
            settings,
            name=arguments.name,
            out=arguments.out,
            device=arguments.device,
            verbose=arguments.verbose,
            check_first=lambda: check_served(arguments.model, settings),
        )
    except BaseException as error:
        arguments.after_interrupt = getattr(error, "__notes__", [arguments.after_interrupt])[-1]
        raise
    size, words = path.stat().st_size / 2**20, printable(str(path))
    print(f"wrote {words} ({size:.1f} MiB); look at it with: vllm-lexico inspect {words}")
    draw(load_dictionary(path), picture or path.with_suffix(".png"))


def other_picture(out: Path | None) -> Path | None:
    """Where the picture goes if at its usual place, beside a file that is still to be written, there is one already."""
    if out is None or out.exists() or not out.with_suffix(".png").exists():
        return None
    return out.with_name(f"{out.stem}.losses.png")


def settings_of(arguments: argparse.Namespace) -> TrainSettings:
    """What the command line asks for; the rest is what is usual on the device.

    Raises:
        ValueError: a value is out of range, contradicts the dictionary that is adapted, or would do nothing.
    """
    kind = "cpu" if checked_devices(arguments.device) == ["cpu"] else "cuda"
    usual = (ADAPTING if arguments.continue_from else EFFORTS)[kind]
    _refuse_idle(arguments)

    def asked(name: str, effort: Effort = usual) -> Any:
        given = getattr(arguments, name)
        return getattr(effort, name) if given is None else given

    named = {name: getattr(arguments, name) for name in ("atom_bits", "sparsity", "key_metric")}
    learn = LearnSettings(
        atoms=asked("atoms", EFFORTS[kind]),
        shared=asked("shared", EFFORTS[kind]),
        batch=usual.batch,
        **{name: given for name, given in named.items() if given is not None},
    )
    return TrainSettings(
        data=tuple(arguments.data),
        learn=learn,
        vectors=asked("vectors"),
        passes=asked("passes"),
        rounds=asked("rounds"),
        sequence_tokens=arguments.sequence_tokens,
        dtype=arguments.dtype,
        seed=arguments.seed,
        hf_overrides=arguments.hf_overrides,
        max_model_len=arguments.max_model_len,
        writer=arguments.writer or "auto",
        text_tokens=asked("text_tokens"),
        package_text=asked("package_text"),
        continue_from=arguments.continue_from,
    )


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuse what was given and would do nothing: ValueError with why."""
    there = {
        "--continue-from": bool(arguments.continue_from),
        "--data": bool(arguments.data),
        "--rounds 0": arguments.rounds == 0 and bool(arguments.continue_from),
        "--writer transformers": arguments.writer == "transformers",
    }
    for beside, (names, why) in IDLE.items():
        for name in names if there[beside] else ():
            given = getattr(arguments, name)
            check(f"--{name.replace('_', '-')}", given, given is None, f"none with {beside}, {why}")


def check_served(model: str, settings: TrainSettings) -> None:
    """Refuse a model that LEXICO never serves, which its configuration alone says, for the reasons that `check` gives.

    What it serves with one flag of vLLM alone is said on stderr.

    Args:
        model: hub id or folder.
        settings: of the training.

    Raises:
        ValueError: with the reasons; or the configuration cannot be read, or describes no decoder with attention.
        OSError: the model is not there.
    """
    from vllm_lexico.check.model import NothingCodedError, read_shape
    from vllm_lexico.check.verdict import reasons_against

    try:
        shape = read_shape(model, model, settings.hf_overrides)
    except NothingCodedError as error:
        raise ValueError(f"LEXICO does not serve {model}: {error}") from error
    tokens = settings.max_model_len or shape.usual
    window = shape.binding_window(tokens)
    if reasons := reasons_against(shape, window or tokens):
        raise ValueError(f"LEXICO does not serve {model} ({shape.whole.model_type}): {'; '.join(reasons)}")
    if window:
        print(
            f"vllm-lexico: warning: all layers of {printable(model)} look back {window:,} tokens, fewer than the "
            f"{tokens:,} that a sequence may have, so LEXICO serves it, and this dictionary, only with "
            f"--disable-sliding-window or with --max-model-len {window} or less",
            file=sys.stderr,
        )


def _end_with_parent() -> None:
    """End as SIGTERM does once the other end of standard input is closed: so the parent's end is seen, however it came.

    A step that does not come back for long is not waited for.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(EXIT_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
