"""Keep a benchmark's result with what is needed to judge it later.

Each result is one line, a JSON object, in `benchmarks/results/NAME.jsonl`. Lines are appended, never changed: what was
measured stays measured. A value that cannot be found out is null; nothing is guessed.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_lexico.versions import VLLM, version

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Sources copied without their git say their commit here: `git describe --always --dirty --abbrev=40 > COMMIT`.
COMMIT_FILE = ROOT / "COMMIT"
# Results are written while measuring, so they must not make the commit that measured them look changed.
NOT_SOURCE = ":(exclude)benchmarks/results"


def record(
    name: str,
    case: Mapping[str, Any],
    metric: str,
    value: float,
    peer: str | None = None,
    peer_value: float | None = None,
    *,
    commit: str | None = None,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Append one result to `folder`/NAME.jsonl and return it.

    name: the benchmark's; the file's stem. case: what was run (shapes, settings). metric: what `value` is, with its
    unit in the name (`decode_ms`, `kv_cache_tokens`). peer, peer_value: what it is compared with, measured in the same
    way; `ratio` is then value / peer_value. commit: the measured commit, where neither git nor COMMIT knows it.

    Raises ValueError if a value is not a finite number, the name is no plain file name, or of peer and peer_value only
    one is given.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"a benchmark's name is letters, digits, - and _, because it names a file; given was {name!r}")
    if (peer is None) != (peer_value is None):
        raise ValueError(f"a peer needs both its name and its value; given were {peer!r} and {peer_value!r}")
    for number in (value, peer_value):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{metric} of {name} is {number}; only finite numbers can be recorded: mend the run")
    row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or find_commit(ROOT),
        **environment(),
        "case": dict(case),
        "metric": metric,
        "value": value,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": value / peer_value if peer_value else None,
    }
    line = json.dumps(row, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return row


def environment() -> dict[str, str | None]:
    """GPU, driver and the versions of torch, triton and vLLM; None where there is none."""
    gpu, driver = gpu_and_driver()
    return {
        "gpu": gpu,
        "driver": driver,
        "torch": version("torch"),
        "triton": version("triton"),
        "vllm": version(*VLLM),
    }


def gpu_and_driver() -> tuple[str | None, str | None]:
    """Name and driver version of the first GPU; (None, None) where nvidia-smi finds none."""
    output = run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not output:
        return None, None
    gpu, _, driver = output.splitlines()[0].rpartition(", ")
    return gpu, driver


def find_commit(root: Path) -> str | None:
    """What the file COMMIT says, else the full commit of the checkout at `root`, with -dirty if sources were changed.

    The file comes first: who writes it has copied sources to where the checkout, if there is one, is another's.
    """
    commit_file = root / COMMIT_FILE.name
    if commit_file.exists() and (said := commit_file.read_text(encoding="utf-8").strip()):
        return said
    # A checkout inside someone else's repository has git, but its commit is not ours.
    if (root / ".git").exists() and (commit := run("git", "-C", str(root), "rev-parse", "HEAD")):
        changed = run("git", "-C", str(root), "status", "--porcelain", "--", ".", NOT_SOURCE)
        return f"{commit}-dirty" if changed else commit
    return None


def run(*command: str) -> str | None:
    """What `command` prints, stripped; None if it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
