"""Quality against bytes of LEXICO and vLLM's other KV caches: `vllm-lexico eval`, and a row for each figure.

    python benchmarks/quality.py MODEL --data DIR --out DIR

Takes every option of `vllm-lexico eval`. When that is done, whatever failed, rows go to
benchmarks/results/quality.jsonl: metric the task, case.cache, case.bytes_percent (of 16 bits, for a long sequence),
value, peer bf16. A figure that was recorded from the same folder before is not recorded again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import RESULTS, record

from vllm_lexico.cli import main as command
from vllm_lexico.evals.folder import alone_in
from vllm_lexico.evals.results.summary import flat_rows, read_metrics
from vllm_lexico.evals.sealed import read_sealed, write_sealed

RECORDED_FILE = "recorded.json"  # in the evaluation's folder: what has rows already
ABOUT = (
    *("bytes_percent", "held_percent", "sequence_tokens", "count", "low", "high", "ratio_low", "ratio_high"),
    *("lost", "won"),
)


def record_rows(out: Path, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Record the figures of an evaluation that have no row yet; returns the new rows.

    Raises:
        ValueError: the folder's files are damaged, or an evaluation runs in it.
    """
    with alone_in(out):
        return _record_rows(out, folder)


def _record_rows(out: Path, folder: Path) -> list[dict[str, Any]]:
    metrics = read_metrics(out)
    path = out / RECORDED_FILE
    try:
        before = read_sealed(path, dict[str, list[str]]).get("rows", []) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and its rows from {folder}, to record them again") from error
    # A needle's kinds, of ten documents each, are in the report alone.
    new = [row for row in flat_rows(metrics) if _key(row) not in before and "kind" not in row["case"]]
    rows = []
    for row in new:
        # A size, as a needle's length, is part of the case; the metric is the task that it belongs to.
        metric = row["task"] if row["case"] else row["metric"]
        peer = (None, None) if row["peer_value"] is None else (metrics["reference"], row["peer_value"])
        rows.append(record("quality", _case(metrics, row), metric, row["value"], *peer, folder=folder))
        write_sealed(path, {"rows": before + [_key(done) for done in new[: len(rows)]]})
    return rows


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['cache']} {row['metric']}"


def _case(metrics: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    config, cache = metrics["config"], metrics["caches"][row["cache"]]
    lexico = cache["engine"].get("additional_config", {}).get("lexico", {})
    case = {"model": Path(config["model"]).name, "cache": row["cache"]} | {name: row[name] for name in ABOUT}
    if "dictionary" in lexico:
        case["dictionary"] = Path(lexico["dictionary"]).name
    return case | row["case"] | {"settings": config["tasks"][row["task"]]}


def main() -> int:
    """Evaluate, then record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the evaluation")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="of rows (default: %(default)s)")
    args, options = parser.parse_known_args()
    status = command(["eval", "--out", str(args.out), *options])
    if not (args.out / "metrics.json").exists():
        return status
    rows = record_rows(args.out, args.results)
    print(f"{len(rows)} rows in {args.results / 'quality.jsonl'}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
