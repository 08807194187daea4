"""Does any setting change what a family of models answers? LEXICO's exact codec beside vLLM without LEXICO.

    python benchmarks/family_exact.py                              # every family, every setting
    python benchmarks/family_exact.py --families LFM2 "Granite 4" --settings defaults "few pages" --at-once 8

Tiny random checkpoints of tests/engine/tiny_families.py, each setting of bench/crossed.py in an engine of its own, as
many at once as asked. What is refused is listed with its reason. The distance from vLLM is judged by a small number in
float32, and by how far bfloat16 is from float16 in vLLM itself. With a fault planted the answers must be further away
than is allowed. Rows go to benchmarks/results/exactness.jsonl; the exit status says whether anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench import crossed
from bench.crossed import OTHER, PIECES, PLAIN, SQUEEZED, Place, Setting
from bench.record import RESULTS, ROOT, record
from exactness import compare

TESTS = ROOT / "tests" / "engine"
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ON_GPU = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}  # side by side without profiling
REFUSED = ("LEXICO", "--block-size")  # a refusal of ours, or of an engine that asks us, names one of these
IMPORTED_ONCE = ["vllm.entrypoints.llm", "vllm.model_executor.models.llama"]


class Job(NamedTuple):
    """An engine: of a family, with a setting by its name, LEXICO's or vLLM's own."""

    family: str
    name: str
    coded: bool

    @property
    def setting(self) -> Setting:
        """What is set."""
        return (crossed.PEERS | crossed.SETTINGS | crossed.WINDOWED | crossed.STATEFUL)[self.name]


def engine(model: str, job: Job, settings: dict[str, Any], log: str) -> dict[str, Any]:
    """Answers of a job's engine in this process, or why there are none, under "error". log: file of its messages."""
    with Path(log).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    backend = "LEXICO" if job.coded else None
    if not job.coded and "VLLM_CPU_CI_ENV" in os.environ:
        backend = "CPU_ATTN"
    try:
        return crossed.answer(model, job.setting, backend, settings, str(TESTS) if job.coded else "")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def run_one(model: str, job: Job, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, which is ended when it takes too long."""
    context = multiprocessing.get_context("forkserver")
    log = options.logs / f"{job.family}-{job.name}-{'LEXICO' if job.coded else 'vLLM'}.log".replace(" ", "_")
    with ProcessPoolExecutor(1, context) as pool:
        asked = pool.submit(engine, model, job, settings, str(log))
        try:
            return asked.result(min(options.engine_seconds, max(options.until - time.monotonic(), 1)))
        except Late:
            for process in list(pool._processes.values()):
                process.kill()
            return {"error": f"not ready in time; see {log}"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}; see {log}"}


def jobs_of(name: str, family: Any, options: argparse.Namespace) -> list[Job]:
    """Engines of a family, the peers' first."""
    known = crossed.settings_of(family.changes, "VLLM_CPU_CI_ENV" in os.environ)
    asked = {key: known[key] for key in options.settings or known if key in known}
    jobs = [Job(name, PLAIN, False)]
    if (options.dtype or family.dtype) != "float32":
        jobs.append(Job(name, OTHER, False))
    elif options.pieces:
        jobs.append(Job(name, PIECES, False))
    if any(setting.squeezed for setting in asked.values()):
        jobs.append(Job(name, SQUEEZED, False))
    for key, setting in asked.items():
        jobs += [Job(name, key, False)] if crossed.has_own_peer(family.changes, setting) else []
        jobs.append(Job(name, key, True))
    return jobs


class Judge:
    """Prints and records each engine of LEXICO's as soon as those are there that it is compared with."""

    def __init__(self, families: dict[str, Any], dtype: str | None, out: Path, pieces: bool = False) -> None:
        """families: of tiny_families.py by name. dtype: of all engines; None for the family's. out: folder of rows.

        pieces: whether float32 has PIECES beside it.
        """
        self.families, self.dtype, self.out, self.pieces = families, dtype, out, pieces
        self.found: dict[Job, dict[str, Any]] = {}
        self.said: set[Job] = set()
        self.faults: list[str] = []
        self.refused = self.right = 0

    def take(self, job: Job, result: dict[str, Any]) -> None:
        """What an engine has answered."""
        self.found[job] = result
        for one in list(self.found):
            peers = self._peers(one)
            if one.coded and one not in self.said and peers is not None:
                self.said.add(one)
                self._say(one, *peers)

    def _peers(self, job: Job) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
        own = SQUEEZED if job.setting.squeezed else PLAIN
        if self._other(job) == PIECES and own == PLAIN and crossed.SMALL_CHUNKS.items() <= job.setting.engine.items():
            own = PIECES  # whose prompts come in the same chunks, by which float32 is told from itself
        if crossed.has_own_peer(self.families[job.family].changes, job.setting):
            own = job.name
        named = {one.name: result for one, result in self.found.items() if one.family == job.family and not one.coded}
        names = (own, PLAIN, self._other(job))
        return None if any(name not in named for name in names) else (named[own], named[PLAIN], named[names[2]])

    def _dtype(self, job: Job) -> str:
        return self.dtype or self.families[job.family].dtype

    def _other(self, job: Job) -> str:
        """Which engine of vLLM's shows what its arithmetic alone does to answers; PLAIN where none does."""
        if self._dtype(job) != "float32":
            return OTHER
        return PIECES if self.pieces else PLAIN

    def _say(self, job: Job, theirs: dict[str, Any], plain: dict[str, Any], other: dict[str, Any]) -> None:
        ours, words = self.found[job], f"{job.family} | {job.name} |"
        if error := ours.get("error") or theirs.get("error"):
            peer = theirs.get("error")
            if not peer and error.startswith("ValueError") and any(name in error for name in REFUSED):
                self.refused += 1
                print(f"{words} refused: {error}", flush=True)
            elif peer and "error" in ours:
                print(f"{words} starts neither with LEXICO nor without: {peer[-300:]}", flush=True)
            else:
                self._fault(f"{words} failed {'without LEXICO' if peer else 'with LEXICO'}: {error[-1500:]}")
            return
        dtype, known = self._dtype(job), "error" not in plain and "error" not in other
        noise = compare(plain["answers"], other["answers"]) if known and plain is not other else None
        row, wrong = crossed.judge(ours["answers"], theirs["answers"], noise, dtype)
        faulty, seen = crossed.judge_fault(ours["faulty"], ours["answers"], theirs["answers"], noise, dtype)
        if not all(map(math.isfinite, (row["mean"], row["max"], faulty))):
            self._fault(f"{words} answers are no numbers, or no token is the same: {row}")
            return
        hits, preemptions = ours["hits"], sum(ours["preemptions"])
        if job.setting.squeezed and not preemptions:
            wrong = wrong or "nothing was preempted"
        if not seen and crossed.reads_codes(job.setting):
            wrong = wrong or "empty code pages are not seen"
        largest, parted = crossed.places(ours["answers"], theirs["answers"])
        case = {
            "model": f"tiny {job.family}", "scenario": job.name, "backend": "LEXICO", "dtype": dtype,
            "tokens": row["tokens"], "largest": row["max"], "partings": row["partings"],
            "hits": hits, "hits_without": theirs["hits"], "preemptions": preemptions,
            "with_empty_pages": faulty, "largest_at": largest and largest[:2],
            "parted_at": [(*place[:2], place.nats if math.isfinite(place.nats) else None) for place in parted],
            "wrong": wrong,
        }  # fmt: skip
        peer, peer_mean = (self._other(job), noise["mean"]) if noise else (None, None)
        record("exactness", case, "logprob_gap_mean", row["mean"], peer, peer_mean, folder=self.out)
        print(
            f"{words} {row['tokens']} tokens, mean {row['mean']:.1e} ({_itself(noise, dtype)}), largest "
            f"{row['max']:.1e}, {row['partings']} part; empty pages {faulty:.1e}; "
            f"hits {hits} of {theirs['hits']}, {preemptions} preempted {wrong and 'WRONG: ' + wrong}; "
            f"{where(largest, parted)}",
            flush=True,
        )
        if wrong:
            self.faults.append(f"{words} {wrong}; {where(largest, parted)}")
        else:
            self.right += 1

    def _fault(self, words: str) -> None:
        print(words, flush=True)
        self.faults.append(words[:300])


def _itself(noise: dict[str, float] | None, dtype: str) -> str:
    if noise is None:
        return f"{dtype} itself not known"
    return f"{dtype} itself {noise['mean']:.1e}, largest {noise['max']:.1e}, {noise['partings']} part"


def where(largest: Place | None, parted: list[Place]) -> str:
    """In which answer, at which of its tokens, log-probabilities are furthest apart, and where answers part."""
    words = [f"largest in answer {largest.answer} at {largest.position}"] if largest else []
    for place in parted:
        as_what = f"a tie, {place.nats:.1e} nats" if place.tied else f"no tie, {place.nats:.2f} nats"
        words.append(f"answer {place.answer} parts at {place.position} ({as_what})")
    return ", ".join(words)


def run_all(options: argparse.Namespace, folder: Path) -> Judge:
    """Every job, as many at once as asked."""
    tiny = runpy.run_path(str(TESTS / "tiny_families.py"))
    on_gpu = "VLLM_CPU_CI_ENV" not in os.environ
    families: dict[str, Any] = tiny["FAMILIES"]
    if unknown := set(options.families or ()) - set(families):
        raise ValueError(f"families {sorted(unknown)} are unknown; allowed: {', '.join(families)}")
    dtype = options.dtype or ("bfloat16" if on_gpu else None)
    options.dtype = dtype
    judge = Judge(families, dtype, options.results, options.pieces)
    names = options.families or list(families)
    models = {n: crossed.checkpoint(families[n], folder / n.replace(" ", "_"), tiny["write_checkpoint"]) for n in names}
    jobs = list(_in_turn([jobs_of(name, families[name], options) for name in names]))
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
    threading.stack_size(1 << 20)
    with ThreadPoolExecutor(options.at_once) as threads:
        waiting: dict[Future, Job] = {}
        for job in jobs:
            settings = {"dtype": dtype or families[job.family].dtype} | (ON_GPU if on_gpu else {}) | options.engine
            waiting[threads.submit(run_one, str(models[job.family]), job, settings, options)] = job
        for done in as_completed(waiting):
            judge.take(waiting[done], done.result())
    return judge


def _in_turn(rows: list[list[Job]]) -> Iterator[Job]:
    """Each family's peers, then a setting of each family, and so on: what is cut at the end is a part of all."""
    yield from (job for row in rows for job in row if job.name in crossed.PEERS)
    rest = [[job for job in row if job.name not in crossed.PEERS] for row in rows]
    for at in range(max(map(len, rest), default=0)):
        yield from (row[at] for row in rest if at < len(row))


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", help="of tests/engine/tiny_families.py (default: all)")
    parser.add_argument("--settings", nargs="+", help="of bench/crossed.py (default: all)")
    parser.add_argument("--at-once", type=int, default=1, help="engines at a time (default: %(default)s)")
    parser.add_argument("--dtype", help="of all engines (default: bfloat16 on a GPU, the family's on a CPU)")
    parser.add_argument(
        "--pieces", action="store_true", help="beside float32, vLLM in small chunks: how far it is apart"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--seconds", type=float, default=7200, help="engines that have not answered by then are ended")
    parser.add_argument("--engine-seconds", type=float, default=300, help="most that an engine may take")
    parser.add_argument("--logs", type=Path, default=Path("family_logs"), help="folder for the engines' messages")
    parser.add_argument("--models", type=Path, help="folder that keeps the checkpoints (default: none does)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of exactness.jsonl")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        for name, value in ON_CPU.items():
            os.environ.setdefault(name, value)
    options.until = time.monotonic() + options.seconds
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        judge = run_all(options, options.models or Path(folder))
    print(f"{judge.right} right, {judge.refused} refused, {len(judge.faults)} wrong")
    for fault in judge.faults:
        print(f"WRONG {fault}", file=sys.stderr)
    return 1 if judge.faults else 0


if __name__ == "__main__":
    sys.exit(main())
