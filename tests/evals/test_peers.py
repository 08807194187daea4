"""TurboQuant's batches as vLLM's metadata builder makes them, with and without the fix."""

import types

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backends.turboquant_attn import TurboQuantMetadataBuilder

from vllm_lexico.evals.peers import fix_turboquant


@pytest.fixture
def build(monkeypatch):
    """Metadata of a batch of (computed before, computed now)."""
    monkeypatch.setattr(TurboQuantMetadataBuilder, "build", TurboQuantMetadataBuilder.build)  # put back afterwards
    builder = object.__new__(TurboQuantMetadataBuilder)
    builder.reorder_batch_threshold = 1

    def made(*requests, known=True):
        now = torch.tensor([n for _, n in requests])
        lens = torch.tensor([sum(request) for request in requests])
        starts = torch.cat([torch.zeros(1, dtype=now.dtype), now.cumsum(0)])
        common = types.SimpleNamespace(
            num_reqs=len(requests),
            num_actual_tokens=int(now.sum()),
            max_query_len=int(now.max()),
            max_seq_len=int(lens.max()),
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens if known else None,
            slot_mapping=None,
            block_table_tensor=None,
        )
        return builder.build(0, common)

    return made


def taken_for_fresh(metadata):
    """The question by which vLLM decides that no request of a prefill has cached tokens."""
    prefills = metadata.seq_lens[metadata.num_decodes :]
    return metadata.is_prefill and metadata.max_query_len == int(prefills.max())


FRESH, GOES_ON, DECODES = (0, 1000), (400, 100), (700, 1)


@pytest.mark.parametrize(
    ("batch", "fresh", "fixed"),
    [
        ([FRESH, (0, 300)], True, True),
        ([GOES_ON, FRESH], True, False),  # the fault
        ([DECODES, GOES_ON, FRESH], True, False),
        ([DECODES, FRESH], True, True),  # what decodes is computed apart
        ([GOES_ON, (900, 1000)], False, False),
        ([DECODES, DECODES], False, False),
    ],
)
def test_requests_that_go_on_are_not_taken_for_fresh(build, batch, fresh, fixed):
    assert taken_for_fresh(build(*batch)) == fresh
    fix_turboquant()
    made = build(*batch)
    assert taken_for_fresh(made) == fixed
    assert made.is_prefill == any(now > 1 for _, now in batch)


def test_lengths_that_only_the_device_knows_are_not_trusted(build):
    fix_turboquant()
    assert not taken_for_fresh(build(FRESH, known=False))


def test_it_is_fixed_once(build):
    fix_turboquant()
    once = TurboQuantMetadataBuilder.build
    fix_turboquant()
    assert TurboQuantMetadataBuilder.build is once
