"""How long `vllm-lexico train` takes, everything included, and how long it would for a larger model.

    python benchmarks/training.py MODEL --name ORG/MODEL --file OUT.safetensors -- --data books.jsonl.xz --atoms 4096

    python benchmarks/training.py FOLDER --shape llama-3.1-8b --tokenizer MODEL --name random --file OUT.safetensors

The second writes a model of random weights of that shape into FOLDER first, which is not timed, with another model's
tokenizer, of no more tokens: what it writes means nothing, and takes as long as if it did.

What follows -- goes to `vllm-lexico train`. Writes `train_seconds` to benchmarks/results/dictionary.jsonl, and with
--predict a second row for the shape of Llama-3.1-8B, with how it was predicted.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import RESULTS, record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_weights
from bench.terminated import end_orderly

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.processes import stop

HOW = (
    "as many vectors a layer and part; reading scaled by the weights a token meets over the KV heads it fills, "
    "learning by the layers, the rest as measured"
)
KEPT = re.compile(r"kept (\d+) tokens in ([\d.]+) s of reading, made (\d+) codes in ([\d.]+) s")
# The same for a try on a CPU.
SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
# Llama-3.1-8B: layers, KV heads, and weights that a token is multiplied with (without embedding and head).
LLAMA_8B_LAYERS, LLAMA_8B_HEADS, LLAMA_8B_WEIGHTS = 32, 8, 6.98e9


SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B, "llama-of-one-layer": LLAMA_3_1_8B | SMALL}


def body_weights(model: str) -> int:
    """Weights of a model's layers, of the shapes in its configuration."""
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    with no_init_weights():
        import torch

        with torch.device("meta"):
            body = AutoModel.from_config(AutoConfig.from_pretrained(model))
    return sum(weight.numel() for name, weight in body.named_parameters() if "embed" not in name)


def main() -> None:
    """Train, measure, predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or hub id")
    parser.add_argument("--name", required=True, help="what the dictionary calls the model")
    parser.add_argument("--file", type=Path, required=True, help="the dictionary to write")
    parser.add_argument("--shape", choices=SHAPES, help="of a model of random weights to write into MODEL first")
    parser.add_argument("--tokenizer", type=Path, help="folder of the model whose tokenizer it gets")
    parser.add_argument("--predict", action="store_true", help="predict the time for the shape of Llama-3.1-8B")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, rest = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if args.shape:
        folder = write_model(Path(args.model), SHAPES[args.shape])
        written = write_random_weights(folder, args.tokenizer)
        print(f"wrote {written / 2**30:.1f} GiB of random weights into {folder}", flush=True)
    command = [sys.executable, "-m", "vllm_lexico.cli", "train", args.model, "--name", args.name, "--out"]
    end_orderly()
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, str(args.file), *rest], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    kept = None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            kept = KEPT.search(line) or kept
        failed = process.wait()
    finally:
        stop(process)
    if failed or kept is None:
        sys.exit("training.py: training failed, see above")
    seconds = time.monotonic() - started
    dictionary = load_dictionary(args.file)
    info, shape = dictionary.info, dictionary.info.fingerprint
    _, reading, codes, learning = (float(number) for number in kept.groups())
    case = {
        "model": args.name, "layers": shape.num_layers, "atoms": info.atoms, "atom_bits": info.atom_bits,
        "shared": dictionary.shared, "data": info.data, "vectors": info.vectors_seen, "recipe": info.recipe,
        "reading_seconds": reading, "learning_seconds": learning, "codes": int(codes),
    }  # fmt: skip
    if args.shape:
        case |= {"weights": "random", "shape": args.shape}
    record("dictionary", case, "train_seconds", seconds, folder=args.out)
    print(f"train_seconds {seconds:.1f}: reading {reading:.1f}, learning {learning:.1f}")
    if args.predict:
        # The same vectors a layer and part come from fewer tokens where there are more heads.
        share = shape.num_kv_heads / LLAMA_8B_HEADS
        read = reading * share * LLAMA_8B_WEIGHTS / body_weights(args.model)
        learn = learning * LLAMA_8B_LAYERS / shape.num_layers
        predicted = seconds - reading - learning + read + learn
        words = {"model": "shape of Llama-3.1-8B", "predicted_from": args.name, "how": HOW}
        more = {"layers": LLAMA_8B_LAYERS, "reading_seconds": read, "learning_seconds": learn}
        record("dictionary", case | words | more, "train_seconds_predicted", predicted, folder=args.out)
        print(f"predicted for the shape of Llama-3.1-8B: {predicted:.0f} s (reading {read:.0f}, learning {learn:.0f})")


if __name__ == "__main__":
    main()
