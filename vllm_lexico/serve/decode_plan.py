"""What builders derive for a step in which all requests decode: in one launch each on CUDA, else by `coding_plan`.

In torch it is some hundred launches, more than half a millisecond of the host's time.
"""

from __future__ import annotations

import torch
from lexico_kernels import ops
from lexico_kernels.memory.pages import DecodePlan
from torch import Tensor

from vllm_lexico.serve.coding_plan import CodingPlan, Reach, locate_tokens, max_coded_tokens, plan_coding, raw_starts


class PlanBuffers:
    """Tensors of fixed address for what a builder derives, so that CUDA graphs can hold them.

    Args:
        max_tokens: of a step, padded.
        max_requests: the same.
        device: of the tensors.
    """

    def __init__(self, max_tokens: int, max_requests: int, device: torch.device) -> None:
        coded = max_coded_tokens(max_tokens, max_requests)
        counts = [(max_tokens, torch.int32)] * 2 + [(coded, torch.int32)] * 2 + [(coded, torch.int64)]
        self._most = DecodePlan(*(torch.zeros(count, dtype=dtype, device=device) for count, dtype in counts))

    def of_step(self, num_tokens: int, num_requests: int) -> DecodePlan:
        """The part for a step of T tokens of B requests."""
        coded = max_coded_tokens(num_tokens, num_requests)
        assert num_tokens <= len(self._most.token_request) and coded <= len(self._most.position), (
            "a step beyond buffers"
        )
        sizes = num_tokens, num_tokens, coded, coded, coded
        return DecodePlan(*(most[:size] for most, size in zip(self._most, sizes, strict=True)))


def plan_codes(
    query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, *, block_tokens: int, out: DecodePlan
) -> None:
    """As `lexico_kernels.plan_decode.plan_codes`, on any device."""
    if ops.on_cuda(seq_lens):
        from lexico_kernels import plan_decode

        plan_decode.plan_codes(query_start_loc, seq_lens, block_table, block_tokens=block_tokens, out=out)
        return
    request, position = locate_tokens(query_start_loc, seq_lens, out.token_request.shape[0])
    plan = plan_coding(request, position, block_table, block_tokens)
    destination = plan.destinations(block_table, block_tokens)
    found = request, position + 1, plan.request, plan.position, destination
    for kept, values in zip(out, found, strict=True):
        kept.copy_(values)


def plan_tail(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tail_block_table: Tensor,
    request: Tensor,
    position: Tensor,
    source: Tensor,
    raw_start: Tensor,
    block_tokens: int,
    tail_tokens: int,
    window_tokens: int,
    sink_end: int,
) -> None:
    """As `lexico_kernels.plan_decode.plan_tail`, on any device."""
    batch, reach = (query_start_loc, seq_lens, tail_block_table), (block_tokens, tail_tokens, window_tokens, sink_end)
    if ops.on_cuda(seq_lens):
        from lexico_kernels import plan_decode

        plan_decode.plan_tail(*batch, request, position, source, raw_start, *reach)
        return
    plan = CodingPlan(None, request, position)
    source.copy_(plan.sources(query_start_loc, tail_block_table, tail_tokens, from_batch=False))
    raw_start.copy_(raw_starts(*batch, **Reach(*reach)._asdict()))
