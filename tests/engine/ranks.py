"""Engines on two processes, as tensor and pipeline parallelism use two GPUs: `in_a_process(ask_ranks, ...)`."""

import multiprocessing
import sys
from typing import Any

from engines import TEXT_CHARACTERS
from faults import Faults

SETTINGS = {"enforce_eager": True, "dtype": "float32", "seed": 0, "max_model_len": 768, "max_num_seqs": 8}
FIRST_HEADS = "first heads"


class RankFaults(Faults):
    """What a worker gets in addition: a fault that no single rank shows."""

    def take_first_heads(self) -> None:
        """Every rank loads the codebooks of the first rank's heads."""
        from vllm_lexico.serve import codebooks

        codebooks.heads_of_rank = lambda total, local: slice(0, local)
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        for layer in list(layers.values()):
            if hasattr(layer, "impl"):  # a tail has none
                layer.impl.process_weights_after_loading(self.model_config.dtype)  # type: ignore[attr-defined]


def run_own_experts() -> None:
    """Have the kernel of vLLM 0.32's CPU build run a rank's experts alone: it takes their numbers as they are."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply

    def apply_own(self: Any, *, topk_weights: Any, topk_ids: Any, expert_map: Any, **rest: Any) -> None:
        assert expert_map is not None, "experts are not shared out"
        own = expert_map[topk_ids.long()].to(topk_ids.dtype)
        rest |= {"topk_weights": topk_weights.masked_fill(own < 0, 0), "topk_ids": own.clamp(min=0)}
        apply(self, expert_map=None, **rest)

    CPUUnquantizedExperts.apply = apply_own


def ask_ranks(
    benchmarks: str,
    model: str,
    backend: str,
    lexico: dict[str, Any],
    settings: dict[str, Any],
    *,
    scenarios: list[str],
    fault: str | None = None,
) -> dict[str, Any]:
    """What an engine answers in scenarios of `parallel.py`, under "whole", and with a fault, under its name.

    fault: of faults.FAULTS, or "first heads".
    """
    sys.path.insert(0, benchmarks)
    import exactness
    from bench import parallel_exact
    from vllm.v1.executor import multiproc_executor

    # Workers of vLLM's CPU build are started anew and import everything again, which takes longer than all the rest.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if settings.get("enable_expert_parallel"):
        run_own_experts()
    exactness.ANSWER_TOKENS = parallel_exact.ANSWER_TOKENS = 6
    parallel_exact.SCENARIOS = tuple(getattr(parallel_exact, name) for name in scenarios)
    if backend == "LEXICO":
        settings = settings | {"worker_extension_cls": "ranks.RankFaults"}
    engine = exactness.Engine(model, backend, lexico, TEXT_CHARACTERS, **SETTINGS | settings)
    if settings.get("pipeline_parallel_size", 1) > 1:
        # vLLM 0.32 makes what later stages receive into while it warms up, which it does not do here.
        engine.llm.collective_rpc("execute_dummy_batch")
    found = {"whole": parallel_exact.ask(engine, 1)}
    if fault:
        called = ("take_first_heads", ()) if fault == FIRST_HEADS else ("plant_fault", (fault,))
        engine.llm.collective_rpc(called[0], args=called[1])
        found[fault] = parallel_exact.ask(engine, 1)
    return found
