"""Ways of running vLLM, each asked of an engine in a process of its own: `in_a_process(run_ways, ...)`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import make_tokens, start
from faults import Faults
from ranks import run_own_experts

TOKENS = 8  # of an answer
SECONDS = 300
PROMPTS = [make_tokens(40, 300), make_tokens(41, 520)]
ADAPTERS = ("first", "second")
WIPED = "wiped pages"
SHARED = "adapters share"  # a fault: adapters and the base model have one prefix cache
TOLD = "the tail is told of"  # a fault: a router hears of pages that hold no codes
# Steps of 128 tokens, so that prompts come in pieces and read what was cached.
MANY = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "block_size": 128, "skip_tokenizer_init": False}
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


class WaysFaults(Faults):
    """What a worker gets in addition."""

    def load_from(self, folder: str, by_iterator: bool) -> None:
        """New weights as reinforcement learning brings them: from a checkpoint, or tensor by tensor."""
        from safetensors.torch import load_file

        if by_iterator:
            tensors = load_file(str(Path(folder) / "model.safetensors"))
            self.model_runner.reload_weights(weights_iterator=iter(tensors.items()))  # type: ignore[attr-defined]
        else:
            self.model_runner.reload_weights(weights_path=folder)  # type: ignore[attr-defined]

    def lose_codebooks(self) -> None:
        """As after sleep of level 2 if buffers were no buffers: memory of someone else."""
        for name, buffer in self.model_runner.get_model().named_buffers():  # type: ignore[attr-defined]
            if "lexico_codebooks" in name:
                buffer.copy_(buffer.flatten().roll(7).view(buffer.shape))

    def codebook_addresses(self) -> list[int]:
        """Of the buffers, which captured CUDA graphs know."""
        named = self.model_runner.get_model().named_buffers()  # type: ignore[attr-defined]
        return [buffer.data_ptr() for name, buffer in named if "lexico_codebooks" in name]


def write_adapters(model: Path, folder: Path) -> dict[str, str]:
    """Adapters of random weights that change queries, keys, values and outputs of every layer, as peft writes them."""
    import json

    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {"q_proj": (hidden, queries), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (queries, hidden)}
    found = {}
    for seed, name in enumerate(ADAPTERS):
        draw, tensors, own = torch.Generator().manual_seed(seed), {}, folder / name
        for layer in range(config["num_hidden_layers"]):
            for part, (rows, columns) in sizes.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{part}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, rows, generator=draw) * 0.2
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(columns, 8, generator=draw) * 0.2
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(sizes), "bias": "none"}
        (own / "adapter_config.json").write_text(json.dumps(settings))
        found[name] = str(own)
    return found


class Asked:
    """An engine, and what it is asked in each way; every method returns rows of tokens and log-probabilities."""

    def __init__(self, llm: Any, adapters: dict[str, str]) -> None:
        from vllm.lora.request import LoRARequest

        self.llm = llm
        self.lora = {name: LoRARequest(name, number + 1, path) for number, (name, path) in enumerate(adapters.items())}

    def ask(self, prompts: list[list[int]], adapter: str | None = None, **params: Any) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        usual = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0}
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        lora = self.lora.get(adapter or "")
        outputs = self.llm.generate(asked, SamplingParams(**usual | params), use_tqdm=False, lora_request=lora)
        return [_row(one, output) for output in outputs for one in output.outputs]

    def adapters(self) -> list[dict[str, Any]]:
        """The same prompts by the base model and by adapters in turn: each finds its own cache and no other's."""
        return [row for name in (None, *ADAPTERS, None, *ADAPTERS) for row in self.ask(PROMPTS, name)]

    def priorities(self) -> list[dict[str, Any]]:
        """Urgent requests that come last; in a pool that is too small the others lose their pages."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
        engine, done = self.llm.llm_engine, {}
        for number in range(6):
            prompt = {"prompt_token_ids": make_tokens(50 + number, 630)}
            engine.add_request(f"priority {number}", prompt, params, priority=6 - number)
            engine.step()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
        assert len(done) == 6
        return [_row(done[name].outputs[0], done[name]) for name in sorted(done)]

    def several(self) -> list[dict[str, Any]]:
        """Three answers, drawn; all but the prompt's end is cached, as vLLM's CPU build draws with a seed only then."""
        return self.ask(PROMPTS[1:], "first", n=3, temperature=0.5, seed=7)

    def structured(self) -> list[dict[str, Any]]:
        """Answers of a given form."""
        from vllm.sampling_params import StructuredOutputsParams

        form = StructuredOutputsParams(regex="[A-F]{4}[0-9]{4}")
        return self.ask(PROMPTS, structured_outputs=form, max_tokens=8, ignore_eos=False)

    def beams(self) -> list[dict[str, Any]]:
        """Beam search, which asks for one token after another with its prefix cached."""
        from vllm.sampling_params import BeamSearchParams

        asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        found = self.llm.beam_search(asked, BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True))
        beams = [(prompt, beam) for prompt, one in zip(PROMPTS, found, strict=True) for beam in one.sequences]
        return [{"tokens": beam.tokens[len(p) :], "logprobs": [beam.cum_logprob], "cached": 0} for p, beam in beams]

    def scored(self) -> list[dict[str, Any]]:
        """Log-probabilities of prompts that are in the cache."""
        rows = []
        for prompt in PROMPTS:
            (row,) = self.ask([prompt], prompt_logprobs=0, max_tokens=1)
            rows.append(row)
        return rows

    def forgotten(self) -> list[dict[str, Any]]:
        """After the prefix cache was reset nothing is found, and all is answered as before."""
        assert self.llm.reset_prefix_cache()
        return self.ask(PROMPTS)


SCENARIOS: tuple[Callable[[Asked], list[dict[str, Any]]], ...] = (
    Asked.several, Asked.structured, Asked.beams, Asked.scored, Asked.priorities, Asked.forgotten,
)  # fmt: skip


def _row(one: Any, output: Any) -> dict[str, Any]:
    """Tokens, and log-probabilities of them and of the prompt's where these were asked for."""
    said = [step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)]
    prompt = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    scores = [step[token].logprob for token, step in prompt]
    return {"tokens": list(one.token_ids), "logprobs": scores + said, "cached": output.num_cached_tokens}


def run_ways(
    model: str, backend: str, lexico: dict[str, Any], adapters: dict[str, str], other: str, pool: int | None
) -> dict[str, Any]:
    """What one engine answers in every way, and LEXICO's with faults.

    Args:
        model, backend, lexico: of the engine.
        adapters: folders by name.
        other: a checkpoint of the same shape with other weights.
        pool: pages of the cache.

    Returns:
        answers: rows by the scenario's name, under "whole" and under each fault's.
        events: what a router is told of blocks while adapters answer: (adapter, tokens) of each that was stored;
            under "whole" and TOLD.
        preempted: requests that lost their pages.
    """
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    settings = MANY | LORA | {"scheduling_policy": "priority", "kv_events_config": events}
    settings |= {"num_gpu_blocks_override": pool, "disable_log_stats": False}
    llm = start(model, backend, lexico, settings | {"worker_extension_cls": "ways.WaysFaults"})
    asked, router = Asked(llm, adapters), Router(llm)
    answers, told = {"whole": {"adapters": asked.adapters()}}, {"whole": router.stored()}
    answers["whole"] |= {scenario.__name__: scenario(asked) for scenario in SCENARIOS}
    (preempted,) = [one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]
    if backend == "LEXICO":
        llm.collective_rpc("plant_fault", args=(WIPED,))
        answers[WIPED] = {scenario.__name__: scenario(asked) for scenario in (Asked.adapters, *SCENARIOS)}
        llm.collective_rpc("plant_fault", args=(None,))
        with router.told_all():
            answers[SHARED] = {"adapters": _sharing(asked)}
        told[TOLD] = router.stored()
    for name, by_iterator in (("new weights", False), ("old weights", True)):
        llm.collective_rpc("load_from", args=(model if by_iterator else other, by_iterator))
        llm.reset_prefix_cache()
        answers["whole"][name] = asked.ask(PROMPTS)
    return {"answers": answers, "events": told, "preempted": preempted}


class Router:
    """Listens to an engine's KV events."""

    def __init__(self, llm: Any) -> None:
        self._scheduler, self._told = llm.llm_engine.engine_core.engine_core.scheduler, []
        self._scheduler.kv_event_publisher.publish = lambda batch: self._told.extend(batch.events)

    def stored(self) -> list[tuple[str | None, int]]:
        """Adapter and tokens of the blocks that were stored since the last call."""
        told, self._told = self._told, []
        return [(event.lora_name, len(event.token_ids)) for event in told if type(event).__name__ == "BlockStored"]

    @contextmanager
    def told_all(self) -> Iterator[None]:
        """A fault: events of the tail come through too."""
        pool = self._scheduler.kv_cache_manager.block_pool
        own = vars(pool).pop("take_events")
        self.stored()
        try:
            yield
        finally:
            pool.take_events = own


def _sharing(asked: Asked) -> list[dict[str, Any]]:
    from vllm.v1.core import kv_cache_utils

    asked.llm.reset_prefix_cache()
    own, kv_cache_utils._gen_lora_extra_hash_keys = kv_cache_utils._gen_lora_extra_hash_keys, lambda request: []
    try:
        return asked.adapters()
    finally:
        kv_cache_utils._gen_lora_extra_hash_keys = own


def run_two_engines(
    first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]], other: str
) -> dict[str, Any]:
    """Two engines with codes in one process: the first alone, then both at once, step by step; then new weights.

    Args:
        first, second: model and LEXICO's settings of each.
        other: a checkpoint of the same shape with other weights, which the first then loads.

    Returns:
        alone: rows of the first.
        first, second: rows of each when both answered at once.
        new: rows of the first with the other weights.
        moved: whether codebooks have other addresses then.
        lost: rows of the first when its codebooks have been overwritten.
    """
    more = MANY | {"skip_tokenizer_init": True, "worker_extension_cls": "ways.WaysFaults"}
    one = Asked(start(first[0], "LEXICO", first[1], more), {})
    found: dict[str, Any] = {"alone": one.ask(PROMPTS)}
    two = Asked(start(second[0], "LEXICO", second[1], more), {})
    assert one.llm.reset_prefix_cache()
    found["first"], found["second"] = _at_once(one.llm, two.llm)
    addresses = one.llm.collective_rpc("codebook_addresses")
    one.llm.collective_rpc("load_from", args=(other, False))
    one.llm.reset_prefix_cache()
    found["new"] = one.ask(PROMPTS)
    found["moved"] = one.llm.collective_rpc("codebook_addresses") != addresses
    one.llm.collective_rpc("lose_codebooks")
    one.llm.reset_prefix_cache()
    found["lost"] = one.ask(PROMPTS)
    return found


def _at_once(*engines: Any) -> list[list[dict[str, Any]]]:
    """Rows of engines that take steps in turn."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    done: list[dict[str, Any]] = [{} for _ in engines]
    for llm in engines:
        for number, prompt in enumerate(PROMPTS):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while any(llm.llm_engine.has_unfinished_requests() for llm in engines):
        for llm, own in zip(engines, done, strict=True):
            own |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return [[_row(own[name].outputs[0], own[name]) for name in sorted(own)] for own in done]


def embed(model: str, backend: str, lexico: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Vectors of prompts, from a pooling engine that computes them in pieces, and with the start of one in the cache.

    Returns:
        Vectors under "whole", and under each fault's name; under "cached" (tokens,) of each prompt.
    """
    settings = MANY | {"runner": "pooling", "convert": "embed"}
    llm = start(model, backend, lexico, settings)
    prompts = [*PROMPTS, PROMPTS[1][:400] + PROMPTS[0][:50]]
    found: dict[str, list[list[float]]] = {"cached": []}

    def vectors() -> list[list[float]]:
        llm.reset_prefix_cache()
        rows = []
        for prompt in prompts:
            (output,) = llm.embed([{"prompt_token_ids": prompt}], use_tqdm=False)
            rows.append(list(output.outputs.embedding))
            found["cached"].append([output.num_cached_tokens])
        return rows

    found["whole"] = vectors()
    if backend == "LEXICO":
        llm.collective_rpc("plant_fault", args=(WIPED,))
        found[WIPED] = vectors()
    return found


def run_data_parallel(model: str, backend: str, lexico: dict[str, Any], shared_out: bool) -> list[dict[str, Any]]:
    """What two data-parallel engines with experts answer: in each step they share the experts' work.

    The second is asked less and then only steps along. shared_out: each has half of the experts, or of every expert.

    Returns:
        Of each engine rows under "whole", and LEXICO's with pages wiped.
    """
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    settings = MANY | {"skip_tokenizer_init": True, "enable_expert_parallel": shared_out}
    given = {"model": model, "backend": backend, "lexico": lexico, "settings": settings}
    processes = [context.Process(target=_tell, args=(answers, rank, port, given)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=SECONDS) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.terminate()
    for rank in found.values():
        if isinstance(rank, Exception):
            raise rank
    return [found[0], found[1]]


def _tell(answers: Any, rank: int, *given: Any) -> None:
    try:
        answers.put((rank, _answer_as_rank(rank, *given)))
    except Exception as error:
        answers.put((rank, RuntimeError(f"rank {rank}: {error!r}")))


def _answer_as_rank(rank: int, port: int, given: dict[str, Any]) -> dict[str, Any]:
    import multiprocessing
    import os

    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.v1.executor import multiproc_executor

    if given["settings"]["enable_expert_parallel"]:
        run_own_experts()
    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = _all_gatherv, _reduce_scatterv
    # Workers of vLLM's CPU build are started anew and import everything again, which takes longer than all the rest.
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    os.environ |= {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": "2"}
    os.environ |= {"VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)}
    llm = start(**given)
    asked, found = Asked(llm, {}), {}
    for fault in ("whole", WIPED)[: 1 + (given["backend"] == "LEXICO")]:
        if fault == WIPED:
            llm.collective_rpc("plant_fault", args=(fault,))
            llm.reset_prefix_cache()
        found[fault] = [row for prompts in (PROMPTS, PROMPTS[::-1]) for row in asked.ask(prompts[: 2 - rank])]
    return found


def _all_gatherv(self: Any, tensors: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of all ranks: with `_reduce_scatterv` what vLLM 0.32's CPU build lacks for a data-parallel MoE."""
    import torch

    if isinstance(tensors, list):
        return [_all_gatherv(self, tensor, dim, sizes) for tensor in tensors]
    sizes = sizes or [len(tensors)] * self.world_size
    own = tensors.new_zeros(max(sizes), *tensors.shape[1:])
    own[: len(tensors)] = tensors
    rows = [torch.empty_like(own) for _ in sizes]
    torch.distributed.all_gather(rows, own, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(rows, sizes, strict=True)])


def _reduce_scatterv(self: Any, tensor: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """This rank's rows of the sum over ranks."""
    import torch

    sizes = sizes or [len(tensor) // self.world_size] * self.world_size
    total = tensor.contiguous().clone()
    torch.distributed.all_reduce(total, group=self.device_group)
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]]
