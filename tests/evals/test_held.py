"""Bytes of the pool as vLLM's configurations of the cache say them, counted by hand, and caches that are not there."""

import types

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_lexico.evals.engine import check_cache, unread_caches
from vllm_lexico.evals.held import (
    Held,
    PoolMeter,
    block_bytes,
    capacity_tokens,
    plain_sequence_bytes,
    plain_token_bytes,
    summarize_held,
    token_bytes,
)
from vllm_lexico.serve.tail_pages import LexicoTailSpec

# Qwen2.5-Coder-1.5B: a token of a layer has two heads of 128 keys and as many values, 1,024 bytes in 16 bits.
LAYERS, SHAPE = 28, {"num_kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16}
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
PLAIN_BYTES = LAYERS * 1_024
LONGEST = 32_768


def full(block_size=16, **more):
    return FullAttentionSpec(block_size=block_size, **SHAPE | more)


def windowed(tokens, block_size=16):
    return SlidingWindowSpec(block_size=block_size, sliding_window=tokens, **SHAPE)


def config(num_blocks, block, *groups):
    """What vLLM's scheduler gets. block: bytes that the planner gives one; groups: of (names, spec)."""
    tensors = []
    for names, spec in groups:
        per_layer = getattr(spec, "kv_cache_specs", dict.fromkeys(names, spec))
        offset = 0
        for each in dict.fromkeys(per_layer.values()):  # layers of one spec lie together
            layers = [name for name in names if per_layer[name] == each]
            stride = -(-each.page_size_bytes // each.get_block_stride_alignment()) * each.get_block_stride_alignment()
            tensors.append(KVCacheTensor(num_blocks * block, layers, num_blocks * stride, stride, offset))
            offset += len(layers) * num_blocks * stride
        assert offset <= num_blocks * block
    groups = [KVCacheGroupSpec(names, spec) for names, spec in groups]
    return generate_scheduler_kv_cache_config([KVCacheConfig(num_blocks, tensors, groups)])


def plain():
    return config(7, LAYERS * 16 * 1_024, (NAMES, full()))


def lexico(cell_bytes, tail_tokens):
    """Code pages of 128 tokens and tail pages, which are padded to as many bytes, over each other."""
    codes = full(128, state_content_bytes=cell_bytes)
    page = 128 * 2 * cell_bytes
    own = {"sliding_window": 129, "sink_blocks": 1, "hit_margin_tokens": 0, "concurrent_batches": 1}
    tail = LexicoTailSpec(block_size=tail_tokens, page_size_padded=page, **SHAPE, **own)
    return config(5, LAYERS * page, (NAMES, codes), ([f"{name}.lexico_tail" for name in NAMES], tail))


def turboquant(slot_bytes, pool_bytes=6_500_000_000):
    """The first and last two layers in 16 bits, the others of `slot_bytes` a head and token, in blocks of 32 tokens."""
    slots = full(32, dtype=torch.uint8, state_content_bytes=slot_bytes)
    specs = {name: full(32) if i in (0, 1, 26, 27) else slots for i, name in enumerate(NAMES)}
    block = 4 * 32 * 1_024 + 24 * 32 * 2 * slot_bytes
    return config(pool_bytes // block, block, (NAMES, UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=specs)))


def padded():
    """Pages of 16 KiB in strides of 24: what lies between them is held too."""
    return config(3, LAYERS * 24 * 1_024, (NAMES, full(block_stride_alignment=24 * 1_024)))


def unlike_groups():
    """Groups of 12 and 13 layers over each other: a block has room for the larger."""
    return config(4, 13 * 16 * 1_024, (NAMES[:12], windowed(64)), (NAMES[12:25], full()))


@pytest.mark.parametrize(
    ("make", "block", "token"),
    [
        (plain, 458_752, PLAIN_BYTES),
        (lambda: lexico(64, 16), 458_752, 3_584),  # sparsity 15
        (lambda: lexico(48, 8), 344_064, 2_688),  # sparsity 11: a third of a tail page is padding
        (lambda: turboquant(134), 336_896, 10_528),  # 4 bits
        (lambda: turboquant(102), 287_744, 8_992),  # 3 bits
        (padded, 688_128, 43_008),
        (unlike_groups, 212_992, 13_312),
    ],
)
def test_bytes_are_those_of_the_allocation(make, block, token):
    made = make()
    assert (block_bytes(made), token_bytes(made, LONGEST)) == (block, token)


ROOM = LAYERS * 32 * 1_024  # bytes of a block for any of these groups


@pytest.mark.parametrize(
    ("made", "tokens"),
    [
        (lambda: config(40, ROOM, (NAMES, full())), 40 * 16),
        (lambda: config(40, ROOM, (NAMES[:4], full()), (NAMES[4:8], full(32))), int(40 / (1 / 16 + 1 / 32))),
        (lambda: config(40, ROOM, (NAMES[:4], windowed(512)), (NAMES[4:8], full())), 40 * 16),
        (lambda: config(40, ROOM, (NAMES[:4], STATE), (NAMES[4:8], full())), 40 * 16),  # states do not grow
        (lambda: config(40, ROOM, (NAMES, windowed(LONGEST))), 40 * 16),  # a window of the longest sequence does
        (lambda: config(40, ROOM, (NAMES, windowed(64))), 40 * 16),  # nothing does
    ],
)
def test_tokens_that_the_pool_holds(made, tokens):
    assert capacity_tokens(made(), LONGEST) == tokens


def beside_windows(codes=False):
    """Gemma 3's proportions: two layers that grow and ten with a window of 512, in groups of two."""
    page = 128 * 128 if codes else 16 * 1_024  # codes of S = 15: an eighth
    grown = [(NAMES[:2], full(128, state_content_bytes=64) if codes else full())]
    if codes:
        own = {"sliding_window": 129, "sink_blocks": 1, "hit_margin_tokens": 0, "concurrent_batches": 1}
        tail = LexicoTailSpec(block_size=16, page_size_padded=page, **SHAPE, **own)
        grown.append(([f"{name}.lexico_tail" for name in NAMES[:2]], tail))
    return config(9, 2 * page, *grown, *[(NAMES[i : i + 2], windowed(512)) for i in range(2, 12, 2)])


STATE = MambaSpec(block_size=LONGEST, shapes=((3, 64), (4, 8)), dtypes=(torch.bfloat16, torch.float32))
STATE_BYTES = 3 * 64 * 2 + 4 * 8 * 4


@pytest.mark.parametrize(
    ("make", "longest", "percent", "of_2048"),
    [
        (plain, LONGEST, 100, 2_048 * PLAIN_BYTES),
        (lambda: lexico(64, 16), LONGEST, 12.5, 2_048 * PLAIN_BYTES),
        (beside_windows, LONGEST, 100, 2 * 2_048 * 1_024 + 10 * 512 * 1_024),  # of 12 layers it was 16.67
        (lambda: beside_windows(codes=True), LONGEST, 12.5, 2 * 2_048 * 1_024 + 10 * 512 * 1_024),
        (lambda: beside_windows(codes=True), 400, 12.5 * 2 / 12 + 100 * 10 / 12, 2 * 2_048 * 1_024 + 10 * 512 * 1_024),
        # A window that no sequence outgrows, windows that are kept whole, chunks, states: brothers of the same fault
        (lambda: config(3, 12 * 16_384, (NAMES[:12], windowed(4_096))), 4_096, 100, 12 * 2_048 * 1_024),
        (lambda: config(3, 12 * 16_384, (NAMES[:12], full(sliding_window=64))), LONGEST, 100, 12 * 2_048 * 1_024),
        (
            lambda: config(
                3,
                2 * 16_384,
                (NAMES[:2], full()),
                (NAMES[2:4], ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=1_000, **SHAPE)),
            ),
            LONGEST,
            100,
            2 * 3_048 * 1_024,
        ),
        (
            lambda: config(3, 2 * 16_384, (NAMES[:2], full()), (NAMES[2:4], STATE)),
            LONGEST,
            100,
            2 * (2_048 * 1_024 + STATE_BYTES),
        ),
    ],
)
def test_percentages_are_of_the_same_layers(make, longest, percent, of_2048):
    made = make()
    assert 100 * token_bytes(made, longest) / plain_token_bytes(made, longest) == pytest.approx(percent)
    assert plain_sequence_bytes(made, 2_048) == of_2048


def test_what_is_held_is_of_what_16_bits_would_hold():
    said = summarize_held([Held(10, 300, 600), Held(30, 900, 1_000)])
    assert (said["bytes_per_token"], said["plain_bytes_per_token"]) == (30, 40)
    assert summarize_held([])["plain_bytes_per_token"] is None


@pytest.mark.parametrize(("slot_bytes", "tokens"), [(134, 617_376), (102, 722_848)])
def test_a_pool_has_room_for_as_many_tokens_as_vllm_said(slot_bytes, tokens):
    """Of 6.5 GB, on an H100."""
    made = turboquant(slot_bytes)
    assert made.num_blocks * 32 == tokens and 0 <= 6_500_000_000 - tokens * token_bytes(made, LONGEST) < block_bytes(
        made
    )


def test_several_allocations_are_refused():
    made = plain()
    made.kv_cache_tensors.append(KVCacheTensor(1, ["another"], 1, 1))
    with pytest.raises(ValueError, match="too many values"):
        block_bytes(made)


def test_memory_of_the_host_is_no_block():
    made = plain()
    made.kv_cache_tensors.append(KVCacheTensor(1, ["another"], 1, 1, host_resident=True))
    assert block_bytes(made) == 458_752


def test_a_sequence_is_measured_when_it_ends():
    page, null = types.SimpleNamespace(is_null=False), types.SimpleNamespace(is_null=True)
    given_back = []
    manager = types.SimpleNamespace(
        get_blocks=lambda _: types.SimpleNamespace(blocks=([page, page, null], [page])), free=given_back.append
    )
    meter = PoolMeter(types.SimpleNamespace(kv_cache_manager=manager), turboquant(134))
    for finished in (False, True):  # preempted, then done
        manager.free(types.SimpleNamespace(request_id="r", num_computed_tokens=70, is_finished=lambda f=finished: f))
    assert meter.take() == [Held(70, 3 * 336_896, 70 * PLAIN_BYTES)] and meter.take() == []
    assert len(given_back) == 2 and meter.finished == 1


def worker(*layers):
    """A worker with attention layers of (backend, dtype), and something else that vLLM keeps beside them."""
    made = {str(i): types.SimpleNamespace(attn_backend=b, kv_cache_dtype=d) for i, (b, d) in enumerate(layers)}
    compilation = types.SimpleNamespace(static_forward_context=made | {"experts": types.SimpleNamespace()})
    return types.SimpleNamespace(vllm_config=types.SimpleNamespace(compilation_config=compilation))


def test_a_name_that_a_backend_does_not_know_is_found():
    """As vLLM's CPU build makes TurboQuant: some layers in 16 bits, the others with a name and eight bits."""
    found = unread_caches(worker((CPUAttentionBackend, "auto"), *[(CPUAttentionBackend, "turboquant_4bit_nc")] * 3))
    assert found == {"its CPU_ATTN does not know turboquant_4bit_nc"}


def test_turboquant_beside_layers_in_16_bits_is_read():
    layers = (CPUAttentionBackend, "auto"), (TurboQuantAttentionBackend, "turboquant_3bit_nc")
    assert unread_caches(worker(*layers)) == set()


def test_a_cache_that_is_not_there_is_refused():
    check_cache("turboquant_4bit_nc", [], 10_528, PLAIN_BYTES)
    with pytest.raises(RuntimeError, match=r"but its X does not know Y; the platform does not have this cache"):
        check_cache("turboquant_4bit_nc", ["its X does not know Y"], 16_256, PLAIN_BYTES)
    with pytest.raises(RuntimeError, match=r"takes 28672 bytes, no fewer than in 16 bits; the platform"):
        check_cache("fp8", [], PLAIN_BYTES, PLAIN_BYTES)
