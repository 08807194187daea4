"""One launch plans what `coding_plan` plans, number for number."""

import inspect
import random

import pytest
import torch
from lexico_kernels import plan_decode
from lexico_kernels.memory.pages import DecodePlan

from vllm_lexico.serve import coding_plan, decode_plan

GARBAGE = -77
WIDTH = 24  # code pages of a request's table


def a_step(seed, *, block_tokens, tail_tokens, drafts, padding, num_requests):
    """Random requests that decode, some at the ends of spans and blocks, with padding as CUDA graphs have it."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    query_lens = [rng.randrange(1, 2 + drafts) for _ in range(num_requests)]
    longest = WIDTH * block_tokens - 1
    ends = [*range(31, 4 * block_tokens, 32), *(block * block_tokens - 1 for block in range(1, WIDTH))]
    written = [
        min(longest, rng.choice([rng.randrange(longest), rng.choice(ends) + rng.randrange(3)])) for _ in query_lens
    ]
    empty_requests, empty_tokens = padding
    lengths = [max(n, query) for n, query in zip(written, query_lens, strict=True)] + [0] * empty_requests
    starts = torch.tensor([0, *query_lens, *[0] * empty_requests]).cumsum(0).int()
    code_table = torch.randint(1, 1 << 20, (len(lengths) + 2, WIDTH), generator=generator, dtype=torch.int32)
    tail_table = torch.randint(1, 1 << 20, (len(lengths) + 2, longest // tail_tokens + 1), generator=generator).int()
    tail_table[torch.rand(tail_table.shape, generator=generator) < 0.3] = 0  # pages that a prefix hit did not bring
    tables = code_table[: len(lengths)], tail_table[: len(lengths)]
    return starts, torch.tensor(lengths, dtype=torch.int32), tables, int(starts[-1]) + empty_tokens


def planned(module, step, reach, block_tokens, device="cpu"):
    """What a module's functions fill, in buffers full of garbage."""
    starts, seq_lens, (code_table, tail_table), num_tokens = step
    buffers = decode_plan.PlanBuffers(num_tokens + 70, len(seq_lens) + 5, torch.device(device))
    for kept in buffers._most:
        kept.fill_(GARBAGE)
    out = buffers.of_step(num_tokens, len(seq_lens))
    batch = starts.to(device), seq_lens.to(device)
    module.plan_codes(*batch, code_table.to(device), block_tokens=block_tokens, out=out)
    source, raw_start = (torch.full((len(out.position) + 9,), GARBAGE, dtype=torch.int32, device=device) for _ in "ab")
    parts = {"source": source[: len(out.position)], "raw_start": raw_start[: len(seq_lens)]}
    module.plan_tail(
        *batch, tail_table.to(device), out.request, out.position, *parts.values(), *coding_plan.Reach(**reach)
    )
    for whole, part in [*zip(buffers._most, out, strict=True), *zip((source, raw_start), parts.values(), strict=True)]:
        assert (whole[len(part) :] == GARBAGE).all(), "written beyond a step's part"
    found = out._asdict() | parts
    found["request"] = torch.where(out.position >= 0, out.request, 0)
    return {name: tensor.cpu() for name, tensor in found.items()}


CASES = {
    "llama": {"block_tokens": 128, "tail_tokens": 16},
    "padded_graph": {"block_tokens": 128, "tail_tokens": 16, "padding": (5, 5), "num_requests": 11},
    "drafts": {"block_tokens": 128, "tail_tokens": 16, "drafts": 7, "num_requests": 9},
    "padded_drafts": {"block_tokens": 64, "tail_tokens": 8, "drafts": 3, "padding": (3, 12), "num_requests": 61},
    "crowd": {"block_tokens": 128, "tail_tokens": 32, "num_requests": 300},
    "one": {"block_tokens": 512, "tail_tokens": 64, "num_requests": 1, "drafts": 40},
    "same_answers": {"block_tokens": 128, "tail_tokens": 16, "counted_from": 128},
    "long_window": {"block_tokens": 128, "tail_tokens": 8, "window_tokens": 1500},
    "no_sinks": {"block_tokens": 128, "tail_tokens": 16, "sink_end": 0, "window_tokens": 300},
}


def both(case, seed, device):
    given = {"drafts": 0, "padding": (0, 0), "num_requests": 16} | case
    reach = {
        "window_tokens": given.pop("window_tokens", 128 + given["drafts"]),
        "sink_end": given.pop("sink_end", 2 * case["tail_tokens"]),
        "block_tokens": given.pop("counted_from", 1),
        "tail_tokens": case["tail_tokens"],
    }
    step = a_step(seed, **given)
    wanted = planned(decode_plan, step, reach, case["block_tokens"])
    return wanted, planned(plan_decode, step, reach, case["block_tokens"], device)


@pytest.mark.parametrize("name", CASES)
def test_a_launch_plans_what_torch_does(name, device):
    coded = skipped = 0
    for seed in range(1 if name == "crowd" else 4):
        wanted, found = both(CASES[name], seed, device)
        for field, tensor in wanted.items():
            assert torch.equal(found[field], tensor), (field, seed)
        coded += int((wanted["destination"] >= 0).sum())
        skipped += int((wanted["destination"] < 0).sum())
    assert coded > 0 and skipped > 0


def test_the_twin_is_told_in_loops_elsewhere_and_keeps_their_numbers():
    """The twin is `coding_plan`, which test_coding_plan.py checks: each of its numbers has a place in a step's plan."""
    step = a_step(3, block_tokens=128, tail_tokens=16, drafts=2, padding=(2, 4), num_requests=20)
    starts, seq_lens, (code_table, tail_table), num_tokens = step
    reach = {"window_tokens": 130, "sink_end": 32, "block_tokens": 1, "tail_tokens": 16}
    found = planned(decode_plan, step, reach, 128)
    request, position = coding_plan.locate_tokens(starts, seq_lens, num_tokens)
    plan = coding_plan.plan_coding(request, position, code_table, 128)
    source = plan.sources(starts, tail_table, 16, from_batch=False)
    assert found["token_request"].tolist() == request.tolist()
    assert found["token_seq_len"].tolist() == (position + 1).tolist()
    assert found["destination"].tolist() == plan.destinations(code_table, 128).tolist()
    assert found["source"].tolist() == source.tolist()
    assert found["raw_start"].tolist() == coding_plan.raw_starts(starts, seq_lens, tail_table, **reach).tolist()


@pytest.mark.parametrize("name", ["plan_codes", "plan_tail"])
def test_both_have_one_signature(name):
    """What decides how far back tokens are read is passed in its order."""
    one, other = ([*inspect.signature(getattr(module, name)).parameters] for module in (plan_decode, decode_plan))
    assert one == other
    assert name == "plan_codes" or tuple(one[-4:]) == coding_plan.Reach._fields


def test_no_token_is_no_launch(device, monkeypatch):
    monkeypatch.setattr(plan_decode, "_plan_codes", None)
    out = DecodePlan(*(torch.empty(0, dtype=torch.int32, device=device) for _ in DecodePlan._fields))
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    plan_decode.plan_codes(starts, starts[:0], starts[:0, None], block_tokens=128, out=out)
