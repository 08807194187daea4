"""What is read from a profiler's trace, and how an engine is told to write one."""

import argparse
import gzip
import json

import pytest


@pytest.fixture
def step_profile(import_benchmark):
    import_benchmark("families")
    from bench import step_profile

    return step_profile


def event(name, start, duration, kind="kernel"):
    return {"name": name, "cat": kind, "ts": start, "dur": duration}


def test_overlapping_kernels_are_busy_once_and_short_gaps_are_none(step_profile):
    events = [
        event("attend", 100, 50),
        event("multiply", 140, 30),  # starts before `attend` has ended
        event("merge", 180, 10),  # 10 us later
        event("attend", 290, 50, "kernel"),  # 100 us later
        event("graph", 90, 7, "cuda_runtime"),
        {"name": "thread", "ph": "M"},
    ]
    found = step_profile.summary(events, 2)
    assert found["span_ms"] == pytest.approx(0.240 / 2)
    assert found["busy_ms"] == pytest.approx((0.070 + 0.010 + 0.050) / 2)
    assert found["gap_ms"] == pytest.approx(0.100 / 2)
    assert found["kernels"] == [["attend", 1.0, 0.05], ["multiply", 0.5, 0.015], ["merge", 0.5, 0.005]]
    assert found["launches"] == [["graph", 0.5, 0.0035]]
    lines = step_profile.table(found).splitlines()
    assert lines[0] == "0.120 ms per step, 0.065 busy, 0.050 in gaps" and lines[2].split() == ["0.050", "1.0", "attend"]


class Engine:
    """Decodes, and writes a trace when it is told to stop."""

    def __init__(self, folder, kinds):
        self.folder, self.kinds, self.waiting, self.calls, self.profiled = folder, kinds, {}, [], None

    def add_request(self, name, prompt, params):
        self.waiting[name] = params.max_tokens

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        self.waiting = {name: left - 1 for name, left in self.waiting.items() if left > 1}
        self.calls.append("step")
        return [None] * len(self.waiting)

    def start_profile(self):
        self.calls.append("start")

    def stop_profile(self):
        self.calls.append("stop")
        for at, kind in enumerate(self.kinds):
            with gzip.open(self.folder / f"rank{at}.pt.trace.json.gz", "wt") as file:
                json.dump({"traceEvents": [event("attend", 0, 2400, kind)]}, file)


def driver_of(engine):
    return argparse.Namespace(engine=engine, prompts=lambda lengths: [[1] * length for length in lengths])


def test_so_many_steps_are_profiled_in_an_engine(step_profile, tmp_path):
    pytest.importorskip("vllm")
    engine = Engine(tmp_path, ["cpu_op", "kernel"])  # the first trace is the frontend's, without a GPU
    found = step_profile.profile(driver_of(engine), [[1] * 5, [2] * 5], [3, 4], tmp_path)
    assert found["kernels"] == [["attend", pytest.approx(1 / 12, abs=0.01), 0.2]]
    start, stop = engine.calls.index("start"), engine.calls.index("stop")
    assert engine.calls[start:stop].count("step") == step_profile.STEPS


def test_a_run_without_a_gpu_says_so(step_profile, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(step_profile, "WAIT_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="no trace with kernels in"):
        step_profile.profile(driver_of(Engine(tmp_path, ["cpu_op"])), [[1]], [2], tmp_path)


def test_each_engine_writes_into_a_folder_of_its_own(import_benchmark, tmp_path):
    families = import_benchmark("families")
    asked = {"shape": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, "shrink": 64}
    asked |= {"cache_gib": 1, "settings": {}, "peer_settings": {}, "block_sizes": [0, 4096], "logs": tmp_path}
    for measures in (["decode"], ["decode", "profile"]):
        jobs = families.jobs_of("gpt-oss", tmp_path / measures[-1], "", argparse.Namespace(measure=measures, **asked))
        folders = [job.settings.get("profiler_config", {}).get("torch_profiler_dir") for job in jobs]
        assert len({*folders} - {None}) == (3 if "profile" in measures else 0)
