"""Shapes for `parallel.py` and what follows from their times: a model split over ranks, and one rank's part alone.

The part alone has as many query and KV heads, columns of the feed-forward layers and words as a rank has; so what it
lacks of a rank's work is waiting for the other ranks, and ratios between backends should be those of the whole.
"""

from __future__ import annotations

from typing import Any

from bench.shapes import LLAMA_3_1_8B

LLAMA_3_1_70B: dict[str, Any] = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SPLIT = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
PEERS = ("FLASH_ATTN", "fp8")
WITHIN = 0.1  # of one another, a ratio on several ranks and the same on one
WHERE = ("whole", "part")

Results = dict[str, dict[str, dict[str, float]]]  # metric's value of each engine, whole and part: [where][engine]
Row = tuple[dict[str, Any], str, float, str | None, float | None]  # case, metric, value, peer, peer's value


def part_of_rank(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What one of so many ranks holds of a model, as a model of its own.

    Raises:
        ValueError: the ranks cannot split it evenly.
    """
    if uneven := [name for name in SPLIT if config[name] % ranks]:
        raise ValueError(f"{ranks} ranks do not divide {', '.join(uneven)} of this shape; choose another --gpus")
    return config | {name: config[name] // ranks for name in SPLIT}


def metrics(measure: str, result: dict[str, Any]) -> dict[str, float]:
    """The numbers that are kept of a measure's result."""
    if measure == "ttft":
        return {"ttft_seconds": result["seconds"]}
    if measure == "decode":
        return {"decode_tokens_per_second": result["spread"]["tokens_per_second"]}
    return {"kv_cache_tokens": result["tokens"]}


def rows(results: Results, cases: dict[str, dict[str, Any]], shares: dict[str, float]) -> list[Row]:
    """Rows of everything that was measured and has what it is compared with.

    Args:
        results: see `Results`.
        cases: of the whole and of the part.
        shares: bytes per token in percent of bf16's, by engine of LEXICO's.
    """
    out: list[Row] = []
    for where, engines in results.items():
        for engine, measured in engines.items():
            own = cases[where] | ({"bytes_percent": shares[engine]} if engine in shares else {"backend": engine})
            for metric, value in measured.items():
                for peer in PEERS:
                    theirs = engines.get(peer, {}).get(metric)
                    if theirs is not None and peer != engine:
                        out.append((own, metric, value, peer, theirs))
    ratios = _ratios(results, shares)
    return out + [(cases["whole"] | more, metric, value, peer, alone) for more, metric, value, peer, alone in ratios]


def _ratios(results: Results, shares: dict[str, float]) -> list[Row]:
    """Ratios to each peer on all ranks, beside the same ratios on one."""
    out: list[Row] = []
    whole, part = (results.get(where, {}) for where in WHERE)
    for engine in shares:
        for peer in PEERS:
            for metric in whole.get(engine, {}):
                sides = [side for side in (whole, part) if _has(side, metric, engine, peer)]
                ratios = [side[engine][metric] / side[peer][metric] for side in sides]
                if len(ratios) == len(WHERE):
                    case = {"bytes_percent": shares[engine], "against": peer}
                    out.append((case, f"{metric}_ratio", ratios[0], "one rank's part alone", ratios[1]))
    return out


def _has(side: dict[str, dict[str, float]], metric: str, *engines: str) -> bool:
    return all(metric in side.get(engine, {}) for engine in engines)


def is_apart(row: Row) -> bool:
    """Whether this is a ratio that is another one on one GPU."""
    case, _, value, _, alone = row
    return "against" in case and alone is not None and abs(value / alone - 1) > WITHIN


def words(row: Row) -> str:
    """One line about a row."""
    case, metric, value, peer, theirs = row
    what = f"LEXICO at {case['bytes_percent']:.4g} %" if "bytes_percent" in case else case["backend"]
    where = f"TP {case['tensor_parallel']}" if case["tensor_parallel"] > 1 else "one GPU, one rank's part"
    against = f" against {case['against']}" if "against" in case else ""
    line = f"{what}, {where}{against}: {metric} {value:,.4g}"
    if not theirs:
        return line
    line += f", {value / theirs:.3f} of {peer} ({theirs:,.4g})"
    if "against" in case:
        line += ": NOT within 10 %" if is_apart(row) else ": within 10 %"
    return line
