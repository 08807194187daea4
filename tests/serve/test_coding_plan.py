"""The device arithmetic of a step, against the same told in plain loops."""

import pytest
import torch

from vllm_lexico.serve import coding_plan as plan

BLOCK, TAIL = 128, 16


def a_step(computed, query_lens, num_padding_tokens=0, num_padding_requests=0):
    """Tables of a step: request b has computed[b] tokens and adds query_lens[b]."""
    seq_lens = torch.tensor(
        [c + q for c, q in zip(computed, query_lens, strict=True)] + [0] * num_padding_requests, dtype=torch.int32
    )
    starts = [0]
    for query_len in [*query_lens, *[0] * num_padding_requests]:
        starts.append(starts[-1] + query_len)
    num_requests = len(seq_lens)
    table = 1 + torch.randperm(num_requests * 32).reshape(num_requests, 32).to(torch.int32)
    tail_table = 1 + torch.randperm(num_requests * 256).reshape(num_requests, 256).to(torch.int32)
    return torch.tensor(starts, dtype=torch.int32), seq_lens, table, tail_table, starts[-1] + num_padding_tokens


def delay(page):
    return int(plan._delay(torch.tensor(page)))


def coded_end(written, page):
    """End of the span that is coded when a position of a page is written; 0 if none is."""
    block = written // BLOCK * BLOCK
    last = block + BLOCK - 1
    if written == last:
        return last + 1
    ends = [e for e in range(block + plan.SPAN_TOKENS, last, plan.SPAN_TOKENS) if e - 1 + delay(page) == written]
    return ends[0] if ends else 0


STEPS = [
    ([0], [1]),
    ([31], [1]),
    ([0, 31, 63, 5], [1, 1, 1, 1]),
    ([0], [700]),
    ([100, 0, 511, 127], [1, 64, 300, 65]),
    ([30, 30], [40, 1]),
]


@pytest.mark.parametrize("computed, query_lens", STEPS)
@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (3, 2)])
@pytest.mark.parametrize("from_batch", [True, False])
def test_coded_tokens_are_those_of_the_spans_whose_turn_it_is(computed, query_lens, padding, from_batch):
    starts, seq_lens, table, tail_table, num_tokens = a_step(computed, query_lens, *padding)
    request, position = plan.locate_tokens(starts, seq_lens, num_tokens)
    coding = plan.plan_coding(request, position, table, BLOCK)
    source = coding.sources(starts, tail_table, TAIL, from_batch=from_batch).tolist()
    destination = coding.destinations(table, BLOCK).tolist()
    assert len(source) == len(destination) == plan.max_coded_tokens(num_tokens, len(seq_lens))

    expected = {}
    for b, (old, new) in enumerate(zip(computed, query_lens, strict=True)):
        for written in range(old, old + new):
            end = coded_end(written, int(table[b, written // BLOCK]))
            if end:
                for p in range(end - plan.SPAN_TOKENS, end):
                    place = int(table[b, p // BLOCK]) * BLOCK + p % BLOCK
                    slot = int(tail_table[b, p // TAIL]) * TAIL + p % TAIL
                    expected[place] = int(starts[b]) + p - old if from_batch and p >= old else -1 - slot
    assert {place: s for place, s in zip(destination, source, strict=True) if place >= 0} == expected


@pytest.mark.parametrize("computed, query_lens", STEPS)
def test_tokens_are_located(computed, query_lens):
    starts, seq_lens, *_, num_tokens = a_step(computed, query_lens, 4, 1)
    request, position = plan.locate_tokens(starts, seq_lens, num_tokens)
    told = [(b, old + i) for b, (old, new) in enumerate(zip(computed, query_lens, strict=True)) for i in range(new)]
    assert list(zip(request.tolist(), position.tolist(), strict=True))[: len(told)] == told
    assert position.tolist()[len(told) :] == [-1] * 4


@pytest.mark.parametrize("retained", [32, 128, 130])
@pytest.mark.parametrize("computed", [0, 1, 15, 16, 17, 127, 128, 129, 300, 1024])
def test_raw_range_is_the_window_of_whole_pages(computed, retained):
    starts, seq_lens, _, tail_table, _ = a_step([computed], [1])
    (start,) = plan.raw_starts(
        starts, seq_lens, tail_table, window_tokens=retained, tail_tokens=TAIL, sink_end=TAIL
    ).tolist()
    assert start == max(TAIL, max(computed - retained, 0) // TAIL * TAIL)


@pytest.mark.parametrize("num_present", range(9))
def test_missing_window_pages_after_a_hit_are_read_from_codes(num_present):
    starts, seq_lens, _, tail_table, _ = a_step([512], [7])
    first = 512 // TAIL - num_present
    tail_table[0, 1:first] = 0
    (start,) = plan.raw_starts(
        starts, seq_lens, tail_table, window_tokens=128, tail_tokens=TAIL, sink_end=TAIL
    ).tolist()
    assert start == first * TAIL


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("query_len", [1, 3, 5])
def test_every_token_is_coded_in_time(block, query_len):
    """Step by step: nothing leaves the window uncoded, and full blocks are coded."""
    pages = [next(p for p in range(1, 9999) if delay(p) == w) for w in (0, 31, 17, 1, 30, 31, 0, 16)]
    table = torch.tensor([pages], dtype=torch.int32)
    coded = set()
    for first in range(0, len(pages) * block - query_len, query_len):
        written = first + query_len
        request, position = plan.locate_tokens(torch.tensor([0, query_len]), torch.tensor([written]), query_len)
        positions = plan.plan_coding(request, position, table, block).position.tolist()
        kept = [p for p in positions if p >= 0]
        assert positions == kept + [-1] * (len(positions) - len(kept))
        assert all(first - plan.MAX_WAITING_TOKENS <= p < written for p in kept)
        coded.update(kept)
        assert coded >= set(range(written - plan.MAX_WAITING_TOKENS))
        assert coded >= set(range(written // block * block))


def test_requests_in_step_are_coded_apart():
    """Pages at equal distances, as those of requests that started together, get different delays."""
    for distance in range(1, 200):
        pages = torch.arange(64) * distance + 5
        assert plan._delay(pages).bincount(minlength=plan.SPAN_TOKENS).max() <= 12, distance


def test_a_plan_is_handed_over_once_and_in_order():
    handover = plan.PlanHandover()
    with pytest.raises(AssertionError, match="not planned before its tail"):
        handover.take(["a", "b"])
    made, other = (plan.CodingPlan(*torch.full((3, 32), number)) for number in (0, 1))
    handover.put(["a", "b"], made)
    handover.put(["c"], other)  # a second group of codes has pages of its own
    assert handover.take(["a", "b"]) is made and handover.take(["c"]) is other
    with pytest.raises(AssertionError, match="not planned before its tail"):
        handover.take(["a", "b"])


def test_bound_is_never_too_small():
    for num_tokens, num_requests in [(1, 1), (64, 64), (8192, 3), (100, 256)]:
        assert plan.max_coded_tokens(num_tokens, num_requests) % plan.SPAN_TOKENS == 0
        lens = torch.full((num_requests,), num_tokens // num_requests)
        lens[: num_tokens % num_requests] += 1
        spans = sum(min(n, n // plan.SPAN_TOKENS + 2) for n in lens.tolist())
        assert spans * plan.SPAN_TOKENS <= plan.max_coded_tokens(num_tokens, num_requests)
