"""Do engines on several ranks answer alike? What `parallel.py` asks them, and what follows from their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from exactness import ALLOWED_RATIO, Answers, Engine, compare, plain, shared_prefixes

ANSWER_TOKENS = 64
DRAFT_COUNTS = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
LEAST_AGREED = 0.5  # of the tokens up to which the peers agree; with fewer, a small distance says nothing
TIE_NATS = 0.5  # two tokens that part answers were as good as tied if neither engine preferred its own by more
MOST_NATS = 1e3  # written for a token that is not among the best ones at all: JSON has no infinity

Counts = dict[str, int]
Row = tuple[dict[str, Any], str, float, str | None, float | None]  # case, metric, value, peer, peer's value
Found = dict[str, dict[str, Any]]  # of one engine: answers and counts by scenario


class Kind(NamedTuple):
    """An engine of `engines`: whose backend, with which settings of LEXICO's, on how many ranks, with drafts?"""

    backend: str
    lexico: dict[str, Any]
    tensor: int = 1
    pipeline: int = 1
    drafts: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What `LLM` is given for it."""
        ranks = {"tensor_parallel_size": self.tensor, "pipeline_parallel_size": self.pipeline}
        return ranks | ({"speculative_config": DRAFTS} if self.drafts else {})


class Pair(NamedTuple):
    """Two engines that are compared, the two whose distance theirs is judged by, and how much further apart is allowed.

    Each is a name of `engines`.
    """

    one: str
    other: str
    near: str
    far: str
    allowed: float

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.one} from {self.other}"

    @property
    def peer(self) -> str:
        """In words."""
        return f"{self.near} from {self.far}"


def engines(peer: str, ranks: int, dictionary: str) -> dict[str, Kind]:
    """Engines by name, most wanted first.

    Args:
        peer: a backend of vLLM's.
        ranks: of tensor or pipeline parallelism.
        dictionary: the file for real codes.
    """
    exact, codes = {"codec": "exact"}, {"dictionary": dictionary}
    return {
        f"{peer} TP {ranks}": Kind(peer, {}, ranks),
        f"exact TP {ranks}": Kind("LEXICO", exact, ranks),
        f"{peer} TP 1": Kind(peer, {}),
        f"exact PP {ranks}": Kind("LEXICO", exact, 1, ranks),
        f"codes TP {ranks}": Kind("LEXICO", codes, ranks),
        "codes TP 1": Kind("LEXICO", codes),
        f"exact TP {ranks} with drafts": Kind("LEXICO", exact, ranks, drafts=True),
        f"{peer} TP {ranks} with drafts": Kind(peer, {}, ranks, drafts=True),
    }


def pairs(peer: str, ranks: int) -> list[Pair]:
    """What is compared with what, of `engines`."""
    ours, split, whole = f"exact TP {ranks}", f"{peer} TP {ranks}", f"{peer} TP 1"
    return [
        Pair(ours, split, split, whole, ALLOWED_RATIO),
        Pair(f"exact PP {ranks}", split, split, whole, ALLOWED_RATIO),
        Pair(f"exact PP {ranks}", whole, split, whole, ALLOWED_RATIO),
        Pair(f"{ours} with drafts", f"{split} with drafts", split, whole, ALLOWED_RATIO),
        Pair(f"codes TP {ranks}", whole, "codes TP 1", whole, ALLOWED_RATIO),
    ]


def again(engine: Engine, scale: int) -> tuple[Answers, Counts]:
    """Prompts of 300 to 300 + 300 `scale` tokens that the prefix cache holds but for their ends; hits are counted."""
    prompts = [engine.passage(700 + i, 300 + 150 * i) for i in range(2 * scale + 1)]
    engine.answer(prompts, 1)
    before = engine.count("vllm:prefix_cache_hits")
    answers = engine.answer(prompts, ANSWER_TOKENS)
    return answers, {"hits": engine.count("vllm:prefix_cache_hits") - before}


def repetitive(engine: Engine, scale: int) -> tuple[Answers, Counts]:
    """Prompts that repeat themselves, so that drafts from the prompt are found; drafted and accepted are counted."""
    before = [engine.count(name) for name in DRAFT_COUNTS]
    prompts = [(engine.passage(800 + i, 20 + 9 * i) * 30)[: 300 + 40 * i] for i in range(2 * scale)]
    answers = engine.answer(prompts, ANSWER_TOKENS)
    accepted, drafted = (engine.count(name) - old for name, old in zip(DRAFT_COUNTS, before, strict=True))
    return answers, {"accepted": accepted, "drafted": drafted}


SCENARIOS: tuple[Callable[[Engine, int], tuple[Answers, Counts]], ...] = (plain, shared_prefixes, again, repetitive)


def ask(engine: Engine, scale: int) -> Found:
    """What an engine answers in every scenario, each with an empty prefix cache at first. scale: see `exactness.py`."""
    found = {}
    for scenario in SCENARIOS:
        engine.llm.reset_prefix_cache()
        answers, counts = scenario(engine, scale)
        found[scenario.__name__] = {"answers": answers, "counts": counts}
    return found


def distance(one: Found, other: Found) -> dict[str, Any]:
    """Of all answers: what `exactness.compare` says, finite, and the mean by scenario."""
    rows = {name: compare(one[name]["answers"], other[name]["answers"]) for name in one}
    tokens = sum(row["tokens"] for row in rows.values())
    return {
        "tokens": tokens,
        "mean": sum(row["mean"] * row["tokens"] for row in rows.values()) / max(tokens, 1),
        "partings": sum(row["partings"] for row in rows.values()),
        "worst_parting": min(max(row["worst_parting"] for row in rows.values()), MOST_NATS),
        "by_scenario": {name: row["mean"] for name, row in rows.items()},
    }


class Verdict(NamedTuple):
    """A pair's distance, that of the pair that it is judged by, and what is wrong with it, or ""."""

    pair: Pair
    row: dict[str, Any]
    noise: dict[str, Any]
    fault: str

    @property
    def words(self) -> str:
        """One line."""
        ratio = f"{self.row['mean'] / self.noise['mean']:.2f} of " if self.noise["mean"] else ""
        parted = f"{self.row['partings']} answers part, at worst {self.row['worst_parting']:.3g} nats from a tie"
        return (
            f"{self.pair.name}: {self.row['mean']:.3g} nats per token over {self.row['tokens']} tokens, {ratio}"
            f"{self.noise['mean']:.3g} ({self.pair.peer}); {parted}"
            + (f"; TOO FAR: {self.fault}" if self.fault else "")
        )


def judge(pair: Pair, found: Mapping[str, Found]) -> Verdict | None:
    """Compare a pair; None where an engine is missing.

    Args:
        pair: of `pairs`.
        found: what engines answered, by name.
    """
    if not {pair.one, pair.other, pair.near, pair.far} <= set(found):
        return None
    row, noise = distance(found[pair.one], found[pair.other]), distance(found[pair.near], found[pair.far])
    fault = ""
    if row["tokens"] < LEAST_AGREED * noise["tokens"]:
        fault = f"answers agree for {row['tokens']} tokens, and for {noise['tokens']} between the peers"
    elif row["worst_parting"] > max(2 * noise["worst_parting"], TIE_NATS):
        fault = "answers part where there was no tie"
    elif row["mean"] > pair.allowed * noise["mean"]:
        fault = f"more than {pair.allowed} times the peers' distance"
    return Verdict(pair, row, noise, fault)


def count(found: Found, name: str) -> int:
    """Sum of a count over scenarios: "hits", "accepted" or "drafted"."""
    return sum(scenario["counts"].get(name, 0) for scenario in found.values())


def rows(verdict: Verdict, found: Mapping[str, Found], case: dict[str, Any]) -> list[tuple[Row, str]]:
    """What is recorded of a pair, each with a line of words: its distance, and drafts accepted where both drafted."""
    pair, row = verdict.pair, verdict.row
    more = {"pair": pair.name, **{key: value for key, value in row.items() if key != "mean"}}
    more |= {"peer_by_scenario": verdict.noise["by_scenario"], "peer_worst_parting": verdict.noise["worst_parting"]}
    counts = {name: [count(found[side], name) for side in (pair.one, pair.other)] for name in ("hits", "drafted")}
    at = case | more | {"hits": counts["hits"], "allowed": pair.allowed}
    out: list[tuple[Row, str]] = [
        ((at, "logprob_gap_mean", row["mean"], pair.peer, verdict.noise["mean"]), verdict.words)
    ]
    if all(counts["drafted"]):
        ours, theirs = (count(found[side], "accepted") for side in (pair.one, pair.other))
        drafted = {"drafted": counts["drafted"][0], "peer_drafted": counts["drafted"][1]}
        words = f"{pair.one}: {ours} of {drafted['drafted']} drafts accepted; "
        words += f"{pair.other}: {theirs} of {drafted['peer_drafted']}"
        out.append(((case | {"pair": pair.name} | drafted, "accepted_drafts", ours, pair.other, theirs), words))
    return out
