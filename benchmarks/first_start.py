"""How long `vllm serve` takes to start: with `"dictionary": "train"` the first and the second time, beside bf16.

    python benchmarks/first_start.py MODEL --name ORG/MODEL --logs DIR

MODEL is a folder. It is served from a copy, of links, whose rotary embedding differs by a hair, so that no dictionary
of the model is found, and with a cache folder of its own. Writes `start_seconds`, from the command to the first answer
of `/health`, to benchmarks/results/engine.jsonl; bf16 is started twice, and its second start is the peer. Prints what
the log says of the dictionary. --order starts the servers in another order, --budget none after so many seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.health import becomes_healthy
from bench.record import RESULTS, record
from bench.terminated import end_orderly

from vllm_lexico.processes import stop

HAIR = 1.0001  # what the base of the rotary embedding is multiplied with
TRAIN = json.dumps({"lexico": {"dictionary": "train"}})
STARTS = {"bf16-first": "bf16, first", "bf16": "bf16", "lexico-first": "lexico, first", "lexico": "lexico"}
SAID = re.compile(
    r"no dictionary for|trained the dictionary|vLLM started|vLLM cannot|train_seconds|round \d+/\d+|LEXICO:"
)


def strange_copy(model: Path, out: Path) -> Path:
    """A folder of links to the files of a model whose rotary embedding no dictionary knows."""
    out.mkdir()
    for path in model.iterdir():
        if path.name != "config.json":
            (out / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    _turn(config)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def _turn(config: dict[str, Any]) -> None:
    for name, value in config.items():
        if name == "rope_theta":
            config[name] = value * HAIR
        elif isinstance(value, dict):
            _turn(value)


def start(model: Path, lexico: bool, args: argparse.Namespace, log: Path, cache: Path) -> float:
    """Seconds from the command to a healthy server, which is then ended; exits where it does not become one."""
    module = "vllm.entrypoints.cli.main" if args.device == "cuda" else "vllm.entrypoints.openai.api_server"
    named = ["serve", str(model)] if args.device == "cuda" else ["--model", str(model)]
    command = [sys.executable, "-m", module, *named, "--host", "127.0.0.1", "--port", str(args.port)]
    command += ["--served-model-name", "model", *args.serve_arguments.split()]
    if lexico:
        command += ["--attention-backend", "LEXICO", "--additional-config", TRAIN]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        )
    try:
        if not becomes_healthy(process, args.port, args.seconds):
            sys.exit(f"first_start.py: it did not start; the end of {log}:\n{log.read_text()[-4000:]}")
        return time.monotonic() - began
    finally:
        stop(process)


def main() -> None:
    """Start four servers, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--name", required=True, help="what the results call the model")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the servers' logs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8124, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=900, help="that a start may take (default: %(default)s)")
    parser.add_argument("--order", nargs="+", choices=STARTS, default=list(STARTS), help="(default: %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds after which no other start begins (default: none)")
    parser.add_argument("--serve-arguments", default="--max-model-len 4096", help="more arguments of `vllm serve`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    args = parser.parse_args()
    end_orderly()
    args.logs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    try:
        measure(args, strange_copy(args.model, folder / "model"), folder / "cache")
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, model: Path, cache: Path) -> None:
    """Start each, print and record."""
    took: dict[str, float] = {}
    began = time.monotonic()
    try:
        for short in args.order:
            if args.budget is not None and time.monotonic() - began > args.budget:
                print(f"{short}: not started, as {args.budget:.0f} s are over", flush=True)
                break
            name, log = STARTS[short], args.logs / f"{short}.log"
            took[name] = start(model, short.startswith("lexico"), args, log, cache)
            print(f"{name}: {took[name]:.1f} s", flush=True)
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if short.startswith("lexico") and SAID.search(line):
                    print(f"  {line[:200]}")
    finally:  # what was measured before one that failed, too
        for name, seconds in took.items():
            case = {"model": args.name, "start": name, "serve_arguments": args.serve_arguments, "setting": "train"}
            peer = ("bf16", took["bf16"]) if name.startswith("lexico") and "bf16" in took else (None, None)
            record("engine", case, "start_seconds", seconds, *peer, folder=args.out)
    if {"lexico", "bf16"} <= took.keys():
        print(f"second start: {took['lexico'] - took['bf16']:+.1f} s beside bf16's")


if __name__ == "__main__":
    main()
