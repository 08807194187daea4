"""A dry run of vLLM's own KV cache manager over LEXICO's two kinds of pages: does it do what the tail's expects?

A handful of pages, four short requests, no tensors. What is checked is the outcome, not the calls: which pages a
request holds after each step, what a later request finds of it, and that every page comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

BLOCK_TOKENS, TAIL_TOKENS, WINDOW_TOKENS, MAX_TOKENS = 128, 16, 128, 2048
NUM_PAGES = 32  # too few for a request whose tail keeps every page
TAIL_GROUP = 1


class MismatchError(Exception):
    """vLLM did something else than LEXICO's pages need; the message says what."""


def rehearse(manager: type, spec: Any) -> None:
    """Run a request of several chunks, one that continues from it, and one that meets a block under way.

    Args:
        manager: what vLLM has to choose for the tail's pages, `LexicoTailManager`.
        spec: the class of their cache spec, `LexicoTailSpec`.

    Raises:
        MismatchError: an outcome differs.
    """
    shape = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    tail = spec(
        **shape,
        block_size=TAIL_TOKENS,
        sliding_window=WINDOW_TOKENS + 1,
        sink_blocks=1,
        hit_margin_tokens=0,
        concurrent_batches=1,
    )
    codes = FullAttentionSpec(**shape, block_size=BLOCK_TOKENS)
    chosen = KVCacheSpecRegistry.get_manager_class(tail)
    _expect(chosen is manager, f"KVCacheSpecRegistry.get_manager_class gives {_name(chosen)} for the tail's pages")
    chosen = KVCacheSpecRegistry.get_manager_class(codes)
    _expect(chosen not in (manager, None), f"KVCacheSpecRegistry.get_manager_class gives {_name(chosen)} for codes")
    rehearsal = _Rehearsal(codes, tail)
    chosen = type(rehearsal.tail_manager)
    _expect(chosen is manager, f"the coordinator manages the tail's pages with {_name(chosen)}")
    sink = rehearsal.chunks_then_decode()
    rehearsal.continue_from_hit(sink)
    rehearsal.meet_a_block_under_way()


def _expect(outcome: bool, otherwise: str) -> None:
    if not outcome:
        raise MismatchError(otherwise)


def _name(chosen: Any) -> str:
    return getattr(chosen, "__name__", str(chosen))


class _Rehearsal:
    """vLLM's manager over a small pool, driven as its scheduler drives it."""

    def __init__(self, codes: Any, tail: Any) -> None:
        groups = [KVCacheGroupSpec(["codes"], codes), KVCacheGroupSpec(["tail"], tail)]
        self.manager = KVCacheManager(
            KVCacheConfig(NUM_PAGES, [], groups, prefix_cache_retention_interval=0),
            max_model_len=MAX_TOKENS,
            scheduler_block_size=BLOCK_TOKENS,
            hash_block_size=TAIL_TOKENS,
            max_in_flight_tokens=MAX_TOKENS,
            enable_caching=True,
        )
        self.tail_manager = self.manager.coordinator.single_type_managers[TAIL_GROUP]
        self.num_free = self.manager.block_pool.get_num_free_blocks()

    def chunks_then_decode(self) -> int:
        """Pages outside the window are not taken or given back, sinks and windows are kept; returns the sink's id."""
        request = _request("chunks", 640)
        self._step(request, 320)
        self._check(request, [0, *range(12, 20)], range(1, 12), "allocate_new_blocks is not the tail's")
        self._step(request, 320)
        self._check(
            request, [0, *range(12, 20), *range(32, 40)], range(20, 32), "allocate_new_blocks is not the tail's"
        )
        request.append_output_token_ids(1)
        self._step(request, 1)
        self._check(request, [0, *range(32, 41)], range(1, 32), "remove_skipped_blocks is not the tail's")
        sink: int = self._tail_table(request)[0].block_id
        self._free(request)
        return sink

    def continue_from_hit(self, sink: int) -> None:
        """A request with the same prefix takes the sinks of the first, and all of its codes."""
        request = _request("hit", 700)
        blocks, hit = self._find(request)
        _expect(
            hit == 640,
            f"a prefix of 640 cached tokens is a hit of {hit} (find_longest_cache_hit, reachable_block_mask)",
        )
        self._step(request, 60, (blocks, hit))
        taken = self._tail_table(request)[0].block_id
        _expect(taken == sink, "a hit does not bring its sinks (add_local_computed_blocks, reachable_block_mask)")
        self._check(request, [0, *range(40, 44)], [], "add_local_computed_blocks is not the tail's")
        self._free(request)

    def meet_a_block_under_way(self) -> None:
        """A block is no hit before it is computed, nor in a step that completes it and may code it last."""
        request, reader = _request("writer", 256, "other"), _request("reader", 300, "other")
        self._step(request, 250)
        self._expect_hit(reader, 128, "cache_blocks makes tokens known that no step has computed")
        self._step(request, 6)
        self._expect_hit(reader, 128, "cache_blocks or find_longest_cache_hit is not the tail's")
        self.manager.new_step_starts()
        self._expect_hit(reader, 256, "new_step_starts does not reach the tail's manager")
        self._free(request)

    def _step(self, request: Request, num_tokens: int, hit: tuple[Any, int] = (None, 0)) -> None:
        """One scheduling step with tokens of one request, after a prefix hit (blocks, tokens)."""
        self.manager.new_step_starts()
        blocks, hit_tokens = hit
        is_new = request.num_computed_tokens == 0
        taken = self.manager.allocate_slots(request, num_tokens, hit_tokens, blocks, full_sequence_must_fit=is_new)
        _expect(taken is not None, "it reserves more pages than a step takes (get_num_blocks_to_allocate)")
        request.num_computed_tokens += hit_tokens + num_tokens

    def _find(self, request: Request) -> tuple[Any, int]:
        blocks, num_tokens, *_ = self.manager.get_computed_blocks(request)
        return blocks, num_tokens

    def _expect_hit(self, request: Request, tokens: int, otherwise: str) -> None:
        found = self._find(request)[1]
        _expect(found == tokens, f"{otherwise}: a hit of {found} tokens where {tokens} are coded")

    def _tail_table(self, request: Request) -> Any:
        return self.manager.get_blocks(request.request_id).blocks[TAIL_GROUP]

    def _check(self, request: Request, needed: Iterable[int], gone: Iterable[int], otherwise: str) -> None:
        held = {place for place, block in enumerate(self._tail_table(request)) if not block.is_null}
        _expect({*needed} <= held and not held & {*gone}, f"{otherwise}: a request holds tail pages {sorted(held)}")

    def _free(self, request: Request) -> None:
        self.manager.free(request)
        lost = self.num_free - self.manager.block_pool.get_num_free_blocks()
        left = [name for name, of_requests in vars(self.tail_manager).items() if _mentions(of_requests, request)]
        _expect(lost == 0 and not left, f"pop_blocks_for_free is not the tail's: {lost} pages and {left} stay")


def _mentions(of_requests: Any, request: Request) -> bool:
    return isinstance(of_requests, dict) and request.request_id in of_requests


def _request(name: str, num_tokens: int, text: str = "") -> Request:
    """One whose prefixes are known by `text`: requests of one text hit each other's pages. Hashes nothing."""

    def hashes(request: Request) -> Any:
        ends = range(len(request.block_hashes), request.num_tokens // TAIL_TOKENS)
        return [f"{text}{end}".encode() for end in ends]

    return Request(name, [1] * num_tokens, SamplingParams(max_tokens=8), None, block_hasher=hashes)
