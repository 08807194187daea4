"""A vLLM without a model: its real scheduler and page managers, and a worker that remembers what every page holds."""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers are found by their names

BLOCK, HEADS, HEAD_DIM = 64, 2, 64
STOP_TOKEN = 1  # one of those that `page_worker.py` samples


class Case(NamedTuple):
    """Settings of an engine.

    chunk: most tokens per step. spare_pages: pages beyond the smallest pool that vLLM accepts. later: steps with
    prefill leave their tokens to be coded by the next step.
    """

    window: int = 64
    sinks: int = 16
    prefix_hits: str = "codes"
    codec: str = "packed16"
    concurrent: bool = False
    priority: bool = False
    chunk: int = 512
    max_model_len: int = 512
    spare_pages: int = 0
    later: bool = False


@functools.cache
def _base_config(model: Path) -> Any:
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=4,
        block_size=BLOCK,
        enforce_eager=True,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    config = args.create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


class Step(NamedTuple):
    """A step under way: what vLLM scheduled, what the worker answers, and the tail pages that it must keep."""

    scheduled: Any
    output: Any
    kept: dict[str, tuple[int, list[int]]]


class PageEngine:
    """Requests through vLLM's scheduler with LEXICO's two cache groups.

    A position's content is a number for the tokens up to it, so that equal prefixes are equal. The worker writes, codes
    and reads as LEXICO does, by `coding_plan` and the tables that vLLM sends, and asserts that what it reads is right.
    """

    def __init__(self, model: Path, case: Case) -> None:
        from page_worker import Worker
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        self.case, self.config = case, copy.deepcopy(_base_config(model))
        self.config.scheduler_config.async_scheduling = case.concurrent
        self.config.scheduler_config.policy = "priority" if case.priority else "fcfs"
        self.config.scheduler_config.max_num_batched_tokens = case.chunk
        self.config.scheduler_config.max_num_scheduled_tokens = None
        self.config.model_config.max_model_len = case.max_model_len
        kv_cache_config, sizes = self._plan_pages()
        self.config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        structured = StructuredOutputManager(self.config)
        scheduler = AsyncScheduler if case.concurrent else Scheduler
        self.scheduler = scheduler(self.config, kv_cache_config, structured, *sizes)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(sizes[1], sha256)
        self.scheduler.kv_event_publisher = SimpleNamespace(publish=lambda batch: self._follow(batch.events))
        self.pages = self.scheduler.kv_cache_manager
        self.codes, self.tail = self.pages.coordinator.single_type_managers
        self.spec = self.tail.kv_cache_spec
        self.pool = self.pages.block_pool
        self.worker = Worker(self.spec, BLOCK, BLOCK if self.case.prefix_hits == "same" else 1)
        self.under_way: deque[Step] = deque()
        self.published: tuple[Counter[Any], Counter[Any]] = Counter(), Counter()
        self.answers: dict[str, list[int]] = {}
        self.hits: dict[str, int] = {}
        self._arrivals = 0
        self.whole = True  # no step has failed halfway
        self._look_up, self.pages.get_computed_blocks = self.pages.get_computed_blocks, self._count_hit

    def _plan_pages(self) -> tuple[Any, tuple[int, int]]:
        """Groups and pool as vLLM plans them from the specs of a layer: the smallest pool it accepts, and the spare."""
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from vllm_lexico.config import LexicoConfig
        from vllm_lexico.serve.setup import LexicoSetup
        from vllm_lexico.serve.tail_pages import tail_spec

        case = self.case
        given = {name: getattr(case, name) for name in ("window", "sinks", "prefix_hits", "codec")}
        settings = LexicoConfig(**given, coded_later=case.chunk if case.later else 0)
        setup = LexicoSetup(settings, None, 0, self.config.max_concurrent_batches)
        layout = setup.layout(HEAD_DIM, HEADS, BLOCK, torch.bfloat16)
        codes = FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=HEADS,
            head_size=HEAD_DIM,
            dtype=torch.bfloat16,
            state_content_bytes=layout.cell_bytes,
        )
        specs = {"layer": codes, "layer.lexico_tail": tail_spec(setup, layout, torch.bfloat16)}
        needed = sum(spec.max_memory_usage_bytes(self.config) for spec in specs.values()) // layout.page_bytes
        self.config.cache_config.num_gpu_blocks_override = needed + 1 + case.spare_pages
        (planned,) = kv_cache_utils.get_kv_cache_configs(self.config, [specs], [1 << 40])
        planned = kv_cache_utils.generate_scheduler_kv_cache_config([planned])
        return planned, kv_cache_utils.resolve_kv_cache_block_sizes(planned, self.config)

    def add(
        self,
        name: str,
        tokens: list[int],
        max_tokens: int = 8,
        *,
        priority: int = 0,
        resumable: bool = False,
        skip_cache: bool = False,
        stop: bool = False,
        extra_args: dict[str, Any] | None = None,
    ) -> None:
        """Send a request, or the next piece of one that is `resumable`; its last piece is not."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._arrivals += 1
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=skip_cache,
            stop_token_ids=[STOP_TOKEN] if stop else None,
            extra_args=extra_args,
        )
        request = Request(
            name,
            list(tokens),
            params,
            None,
            arrival_time=self._arrivals,
            priority=priority,
            resumable=resumable,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """The client has gone."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> int:
        """Schedule a step, run it, and deliver the oldest that is due; how many tokens were scheduled."""
        self.whole = False
        scheduled = self.scheduler.schedule()
        computed = self.worker.update(scheduled, self.scheduler)
        kept = self._kept_pages(scheduled)
        output = self.worker.run(scheduled, computed)
        if scheduled.total_num_scheduled_tokens:
            self.under_way.append(Step(scheduled, output, kept))
        self.check()
        most = 1 if self.case.concurrent and scheduled.total_num_scheduled_tokens else 0
        if len(self.under_way) > most:
            self.deliver()
        self.whole = True
        return int(scheduled.total_num_scheduled_tokens)

    def deliver(self) -> None:
        """Hand the oldest step's output to vLLM."""
        step = self.under_way.popleft()
        outputs = self.scheduler.update_from_output(step.scheduled, step.output)
        for each in outputs.values():
            for output in each.outputs:
                self.answers.setdefault(output.request_id, []).extend(output.new_token_ids)
        self.check()

    def finish(self, steps: int = 2000) -> None:
        """Run until every request but those that wait for input is done.

        Raises:
            AssertionError: no token was scheduled although requests wait, or it took too many steps.
        """
        idle = 0
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests() and not self.under_way:
                return
            idle = 0 if self.step() or self.under_way else idle + 1
            assert idle < 3, f"hangs: {[(r.request_id, r.status.name) for r in self.scheduler.requests.values()]}"
        raise AssertionError(f"not done after {steps} steps: {list(self.scheduler.requests)}")

    def _kept_pages(self, scheduled: Any) -> dict[str, tuple[int, list[int]]]:
        """First tail page and tail pages of every request that a step reads and leaves for the next; checks them."""
        kept, size, window = {}, self.spec.block_size, self.spec.window_tokens
        for name, new in scheduled.num_scheduled_tokens.items():
            end = self.scheduler.requests[name].num_computed_tokens
            start, table = end - new, self._table(name)
            block_start = start // BLOCK * BLOCK if self.case.prefix_hits == "same" else start
            first, hit = max(block_start - window, 0) // size, self.hits[name] // size
            assert self.worker.tables[name][1][first:] == table[first:], f"the worker has other pages for {name}"
            kept[name] = first, table[first : -(-end // size)]
            from_hit = [page != 0 for page in table[max(first, self.spec.sink_blocks) : hit]]
            assert from_hit == sorted(from_hit), f"{name} has gaps in the window of its hit"
            assert all(from_hit) or self.case.prefix_hits == "codes", f"{name} lacks the window of its hit"
            read = range(max(first, hit), -(-start // size))
            left = range(max((end - window) // size, hit, 0), -(-end // size))
            assert all(table[page] for page in (*read, *left)), f"{name} lacks its window at {start} to {end}: {table}"
        return kept

    def _table(self, name: str) -> list[int]:
        return [block.block_id for block in self.tail.req_to_blocks.get(name, ())]

    def _count_hit(self, request: Any, *args: Any) -> Any:
        found = self._look_up(request, *args)
        self.hits[request.request_id] = found[1]
        return found

    def _follow(self, events: list[Any]) -> None:
        """Follow vLLM's KV events as a router does."""
        from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

        for event in events:
            if isinstance(event, AllBlocksCleared):
                for group in self.published:
                    group.clear()
                continue
            stored = self.published[event.group_idx]
            if not isinstance(event, BlockStored):
                for each in event.block_hashes:
                    assert stored[each] > 0, "removed what was not stored"
                    stored[each] -= 1
                continue
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size, "tokens and hashes differ"
            assert event.block_hashes and event.block_size == (BLOCK, self.spec.block_size)[event.group_idx]
            assert event.parent_block_hash is None or stored[event.parent_block_hash] > 0, "a parent was never stored"
            stored.update(event.block_hashes)

    def check(self) -> None:
        """What must hold between any two calls of vLLM: see the table in docs/design.md."""
        self._follow(self.pages.take_events())
        held: Counter[int] = Counter()
        for manager in (self.codes, self.tail):
            for name, blocks in manager.req_to_blocks.items():
                assert name in self.scheduler.requests, f"pages of {name}, which is gone"
                own = [block.block_id for block in blocks if not block.is_null]
                assert 0 not in own and len(set(own)) == len(own)
                held.update(own)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], f"page {block.block_id} is counted wrongly"
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1 - len(held)
        for name, blocks in self.tail.req_to_blocks.items():
            pages = [block.block_id for block in blocks]
            assert sum(page != 0 for page in pages) <= self.tail.max_admission_blocks_per_request
            assert 0 not in pages[: self.spec.sink_blocks], f"{name} has lost its sinks"
        latest = {name for step in self.under_way for name in step.kept}
        for step in self.under_way:
            for name, (first, pages) in step.kept.items():
                request = self.scheduler.requests.get(name)
                if (
                    name in latest
                    and request
                    and request.status.name == "RUNNING"
                    and not request.num_stale_output_tokens
                ):
                    assert self._table(name)[first : first + len(pages)] == pages, (
                        f"a step of {name} has lost its window"
                    )
        self._check_published()

    def _check_published(self) -> None:
        """What a router believes to be cached are the blocks of codes that a request can hit."""
        from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash

        keys = [block.block_hash for block in self.pool.blocks if block.block_hash is not None]
        codes = {maybe_convert_block_hash(get_block_hash(key)) for key in keys if get_group_id(key) == 0}
        assert {each for each, count in self.published[0].items() if count} == codes and not self.published[1]


@pytest.fixture(scope="session")
def base_config(tiny_llama: Path) -> Any:
    """An engine's configuration, to be copied and changed."""
    pytest.importorskip("vllm")
    return _base_config(tiny_llama)


@pytest.fixture(scope="session")
def page_engine(tiny_llama: Path) -> Callable[..., PageEngine]:
    """Make a `PageEngine` from the fields of a `Case`."""
    pytest.importorskip("vllm")
    return lambda **case: PageEngine(tiny_llama, Case(**case))
