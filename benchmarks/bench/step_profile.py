"""What a GPU does in a step of decode, by PyTorch's profiler in the engine's process: kernels, and gaps between them.

Kernels that start before the one before has ended wait within their own time, so times of kernels may overlap:
`busy_ms` counts each moment once.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.engine_loads import SETTLE_STEPS, Driver, Prompts

STEPS = 12  # that are profiled
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
NAME_LETTERS, KERNELS, GAP_US = 80, 40, 20
WAIT_SECONDS = 60  # for the trace to be written
Event = dict[str, Any]


def settings(folder: Path) -> dict[str, Any]:
    """What `LLM` must be given to be profiled; the folder must be this engine's own."""
    return {"profiler_config": {"profiler": "torch", "torch_profiler_dir": str(folder.resolve())}}


def profile(driver: Driver, contexts: Prompts, new_tokens: list[int], folder: Path) -> dict[str, Any]:
    """Profile steps of decode in which every request takes part.

    Args:
        driver: of an engine with `settings`.
        contexts, new_tokens: as `engine_loads.decode` has them.
        folder: that `settings` had.

    Returns:
        As `summary` does, of `STEPS` steps.

    Raises:
        RuntimeError: no trace was written.
    """
    from vllm import SamplingParams

    prompts = [context + new for context, new in zip(contexts, driver.prompts(new_tokens), strict=True)]
    params = SamplingParams(temperature=0, max_tokens=SETTLE_STEPS + 2 * STEPS, ignore_eos=True, detokenize=False)
    for name, prompt in enumerate(prompts):
        driver.engine.add_request(f"profiled {name}", {"prompt_token_ids": prompt}, params)
    for step in _full_steps(driver.engine, len(prompts)):
        if step == SETTLE_STEPS:
            driver.engine.start_profile()
        elif step == SETTLE_STEPS + STEPS:
            driver.engine.stop_profile()
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        for path in sorted(folder.rglob("*.pt.trace.json*")):
            try:
                if events := on_gpu(_events(path)):
                    return summary(events, STEPS)
            except (EOFError, ValueError):
                continue  # it is being written
        time.sleep(1)
    raise RuntimeError(f"no trace with kernels in {folder}")


def _full_steps(engine: Any, requests: int) -> Iterator[int]:
    """Run an engine to the end of its requests; counts the steps from 1 that bring a token for each of so many."""
    full = 0
    while engine.has_unfinished_requests():
        if len(engine.step()) == requests:
            full += 1
            yield full


def _events(path: Path) -> list[Event]:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


def on_gpu(events: Sequence[Event]) -> list[Event]:
    """All events of a trace if some are of a GPU, else none."""
    return list(events) if any(event.get("cat") in ON_GPU for event in events) else []


def summary(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """What a trace's events say.

    Args:
        events: of Chrome's trace format, times in microseconds.
        steps: that they are of.

    Returns:
        Per step: span_ms from the first kernel to the last one's end, busy_ms with a kernel, gap_ms in gaps longer than
        GAP_US; kernels and launches: [name, calls, ms], those that take longest first.
    """
    kernels = sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    busy, gaps, end = 0.0, 0.0, kernels[0]["ts"]
    for kernel in kernels:
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        gaps += start - end if start - end > GAP_US else 0
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    launches = [event for event in events if event.get("cat") in LAUNCHES]
    return {
        "span_ms": (end - kernels[0]["ts"]) / steps / 1e3,
        "busy_ms": busy / steps / 1e3,
        "gap_ms": gaps / steps / 1e3,
        "kernels": _longest(kernels, steps),
        "launches": _longest(launches, steps),
    }


def _longest(events: Sequence[Event], steps: int) -> list[list[Any]]:
    calls, spent = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in events:
        name = event["name"][:NAME_LETTERS]
        calls[name] += 1
        spent[name] += event.get("dur", 0)
    order = sorted(spent, key=lambda name: -spent[name])[:KERNELS]
    return [[name, round(calls[name] / steps, 2), round(spent[name] / steps / 1e3, 4)] for name in order]


def table(found: dict[str, Any]) -> str:
    """A summary in lines."""
    lines = [f"{found['span_ms']:.3f} ms per step, {found['busy_ms']:.3f} busy, {found['gap_ms']:.3f} in gaps"]
    for what in ("kernels", "launches"):
        lines += [f"{what}, calls and ms per step:"]
        lines += [f"  {ms:8.3f} {calls:7.1f}  {name}" for name, calls, ms in found[what]]
    return "\n".join(lines)
