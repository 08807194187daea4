"""A model whose answers are known beforehand, some of them loops, and what `drafts.py` counts: `count_drafts`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
VOCABULARY, HIDDEN = 256, 512
LOOP, LONG = range(40, 47), range(100, 230)  # tokens that follow one another, the last by the first
LAST_LETTERS = range(14, 28)  # of a prompt, by which its answer runs around LOOP; others run along LONG


def following(token: int) -> int:
    """What the model says after a token; prompts are of tokens below those of `LOOP`."""
    for circle in (LOOP, LONG):
        if token in circle:
            return circle[(token - circle[0] + 1) % len(circle)]
    return LOOP[0] if token in LAST_LETTERS else LONG[0]


def plant_answers(checkpoint: Path) -> None:
    """Have a checkpoint of `VOCABULARY` tokens and `HIDDEN` columns look at the last token alone, see `following`."""
    from safetensors.torch import load_file, save_file

    (file,) = checkpoint.glob("model*.safetensors")
    weights = load_file(file)
    embeddings = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
    head = torch.zeros(VOCABULARY, HIDDEN)
    for token in (*range(LOOP[0]), *LOOP, *LONG):
        head[following(token)] += embeddings[token]
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = torch.zeros_like(weight)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = (embeddings if "embed" in name else head).to(weight.dtype)
    save_file(weights, file, {"format": "pt"})


def count_drafts(
    benchmarks: str, model: str, lexico: dict[str, Any], settings: dict[str, Any], out: Path, asked: dict[str, Any]
) -> dict[str, Any]:
    """What an engine of `drafts.py` has written, what vLLM counted in all, and each greedy prompt's last token."""
    sys.path.insert(0, benchmarks)
    import drafts
    import exactness

    engines, generate = [], exactness.Engine.__init__

    def keep(self: Any, *args: Any, **more: Any) -> None:
        generate(self, *args, **more)
        engines.append(self)

    exactness.Engine.__init__ = keep  # type: ignore[method-assign]
    drafts.run(
        argparse.Namespace(
            model=model, backend="LEXICO", lexico=lexico, drafts=DRAFTS, settings=settings, out=out, **asked
        )
    )
    (engine,) = engines
    names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    lengths = [length for length in drafts.LENGTHS if length <= asked["longest"]]
    prompts = [engine.passage(number, lengths[number % len(lengths)]) for number in range(asked["requests"])]
    return {
        "found": json.loads(out.read_text()),
        "counted": [engine.count(name) for name in names],
        "last": [prompt[-1] for prompt in prompts],
    }
