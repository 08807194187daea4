"""What a connector brings: whole blocks of codes with their sinks; what two engines agree on before."""

import functools
import types

import pytest

pytest.importorskip("vllm")
from lexico_kernels import CodeLayout
from tails import BLOCK, TAIL, make_manager, make_spec

from vllm_lexico.config import LexicoConfig, Sparsity
from vllm_lexico.serve import tail_hits
from vllm_lexico.serve.connectors import identity, nixl, offloading
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_pages import LexicoTailManager

POOL = 100  # pages
make = functools.partial(make_manager, POOL)


@pytest.mark.parametrize("sink_blocks", [0, 1, 3])
def test_what_is_brought_takes_pages_for_its_sinks_alone(sink_blocks):
    manager, pool, _ = make(sink_blocks=sink_blocks)
    free = pool.get_num_free_blocks()
    predicted = manager.get_num_blocks_to_allocate("r", 512, [], 512, 0, 512)
    manager.add_local_computed_blocks("r", [], 0, 512)
    manager.allocate_external_computed_blocks("r", 0, 512)
    manager.allocate_new_blocks("r", 512, 512)
    table = manager.req_to_blocks["r"]
    assert [i for i, block in enumerate(table) if not block.is_null] == list(range(sink_blocks))
    assert len(table) == 512 // TAIL and free - pool.get_num_free_blocks() == predicted == sink_blocks
    fresh = manager.get_num_blocks_to_allocate("r", 600, [], 512, 512, 600)
    manager.allocate_new_blocks("r", 600, 600)
    assert [i for i, block in enumerate(table) if not block.is_null][sink_blocks:] == list(range(32, 38))
    assert fresh == 6
    manager.free("r")
    assert pool.get_num_free_blocks() == free


def test_what_is_brought_after_a_local_hit_takes_no_page():
    manager, pool, _ = make()
    sinks = pool.get_new_blocks(1)
    local = sinks + [pool.null_block] * (BLOCK // TAIL - 1)
    free = pool.get_num_free_blocks()
    predicted = manager.get_num_blocks_to_allocate("r", 512, local, 512, BLOCK, 512)
    manager.add_local_computed_blocks("r", local, BLOCK, 384)
    manager.allocate_external_computed_blocks("r", BLOCK, 384)
    assert free - pool.get_num_free_blocks() == predicted == 0
    assert len(manager.req_to_blocks["r"]) == 512 // TAIL


def test_part_of_a_block_is_never_brought():
    manager, _, _ = make()
    manager.add_local_computed_blocks("r", [], 0, 500)
    with pytest.raises(AssertionError, match="part of a block"):
        manager.allocate_external_computed_blocks("r", 0, 500)


def test_what_follows_a_local_hit_needs_no_sinks():
    _, pool, spec = make(sink_blocks=2)
    hashes = [f"hash{i}".encode() for i in range(256 // TAIL)]

    def find():
        (blocks,), length = LexicoTailManager.find_longest_cache_hit(
            hashes, 256, [0], pool, spec, drop_eagle_block=False, alignment_tokens=BLOCK
        )
        assert all(block.is_null for block in blocks)
        return length

    assert find() == 0
    with tail_hits.looking_from(pool, 128):
        assert find() == 256
    with tail_hits.looking_from(pool, TAIL):  # one of the two sinks is among these hashes
        assert find() == 0
    assert find() == 0


def setup(sparsity=15, codec="packed16", path=None):
    return LexicoSetup(LexicoConfig(sparsity=Sparsity(sparsity, sparsity), codec=codec), path, 0, 1)


def test_engines_agree_on_all_that_a_code_means(monkeypatch):
    monkeypatch.setattr(identity, "read_checksum", lambda path: f"sha-of-{path}")

    def said(path="a", block=128, sinks=1, drafts="no", **settings):
        own = setup(path=path, **settings)
        layout = CodeLayout(64, 2, own.config.sparsity.key, own.config.sparsity.value, own.config.codec, block)
        return identity.identity(own, layout, make_spec(sink_blocks=sinks), drafts)

    assert said() == said() and "dictionary sha-of-a," in said()
    own = said()
    others = [said("b"), said(sparsity=7), said(codec="exact"), said(block=64), said(sinks=2), said(drafts="mtp")]
    monkeypatch.setattr(identity, "LAYOUT_VERSION", identity.LAYOUT_VERSION + 1)
    assert len({own, said(), *others}) == 8


def test_a_worker_compares_the_identity_too():
    worker = object.__new__(nixl.AgreeingWorker)
    worker.__dict__["compat_hash"] = None  # as vLLM's own worker has set it
    worker.become("dictionary abc")
    assert worker.compat_hash is None
    worker.compat_hash = "vllms"
    assert worker.compat_hash == "vllms (dictionary abc)"


class Told(nixl.WholeBlocks):
    """With a base that records what it is asked."""

    def __init__(self):
        self._codes, self._tail, self._sink_blocks, self._block_tokens = 0, 1, 2, BLOCK
        self._reading = None


@pytest.fixture
def scheduler(monkeypatch):
    """The scheduler of an engine with Nixl, whose base class reports all of a prompt and keeps what it would read."""
    seen = {}

    def finished(self, request, block_ids):
        return True, {"remote_block_ids": self.get_exchange_clipped_blocks(block_ids)}

    def allocated(self, request, blocks, count):
        here = blocks.get_unhashed_block_ids_all_groups() if count else ()
        seen["here"] = self.get_exchange_clipped_blocks(here)

    base = nixl.NixlPullConnectorScheduler
    monkeypatch.setattr(base, "request_finished", finished)
    monkeypatch.setattr(base, "update_state_after_alloc", allocated)
    monkeypatch.setattr(base, "get_num_new_matched_tokens", lambda self, request, n: (request.num_tokens - n, True))
    return Told(), seen


def test_full_blocks_and_sinks_are_offered(scheduler):
    request = types.SimpleNamespace(num_computed_tokens=300)
    _, params = scheduler[0].request_finished(request, ([11, 12, 13], [1, 2, 0, 0, 8, 9]))
    assert params["remote_block_ids"] == ([11, 12], [1, 2])


@pytest.mark.parametrize(
    ("prompt", "local", "offered", "brought"),
    [(300, 0, 2, 256), (256, 0, 2, 128), (257, 0, 2, 256), (100, 0, 0, 0), (300, 128, 2, 128), (300, 256, 2, 0)],
)
def test_whole_blocks_are_taken_and_a_token_is_left(scheduler, prompt, local, offered, brought):
    told = {"remote_block_ids": (list(range(offered)), [1, 2])}
    request = types.SimpleNamespace(num_tokens=prompt, kv_transfer_params=told)
    assert scheduler[0].get_num_new_matched_tokens(request, local) == (brought, brought > 0)


def page(block_id, block_hash=None, is_null=False):
    return types.SimpleNamespace(block_id=block_id, block_hash=block_hash, is_null=is_null)


class Columns:
    """Blocks by group, as vLLM's `KVCacheBlocks`."""

    def __init__(self, *columns):
        self.blocks = columns

    def get_unhashed_block_ids_all_groups(self):
        return [[b.block_id for b in blocks if b.block_hash is None and not b.is_null] for blocks in self.blocks]


@pytest.mark.parametrize("local", [0, 1])
def test_each_block_is_read_to_its_own_place(scheduler, local):
    """Two of three blocks that are offered, or the second alone where the first is here."""
    codes = [page(50, b"known" if local else None), page(51)]
    sinks = [page(60, b"known" if local else None), page(61, b"known" if local else None)]
    nulls = [page(0, is_null=True)] * 14
    told = {"do_remote_prefill": True, "remote_block_ids": ([11, 12, 13], [1, 2])}
    request = types.SimpleNamespace(request_id="r", kv_transfer_params=told)
    scheduler[0].update_state_after_alloc(request, Columns(codes, sinks + nulls), BLOCK * (2 - local))
    assert told["remote_block_ids"] == (([12], []) if local else ([11, 12], [1, 2]))
    assert scheduler[1]["here"] == (([51], []) if local else ([50, 51], [60, 61]))
    assert scheduler[0].get_exchange_clipped_blocks(([1], [2])) == ([1], [2])  # others are not cut


def test_a_load_job_gets_the_sinks_of_the_last_group():
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
    from vllm.v1.kv_offload.base import GPULoadStoreSpec

    spec = GPULoadStoreSpec([50, 51], group_sizes=[2, 0], block_indices=[0, 16])
    job = offloading._with_sinks(TransferJob("r", None, spec), 1, [60])
    assert job.dst_spec.block_ids.tolist() == [50, 51, 60] and job.req_id == "r"
    assert list(job.dst_spec.group_sizes) == [2, 1] and list(job.dst_spec.block_indices) == [0, 0]
    with pytest.raises(AssertionError, match="no page"):
        offloading._with_sinks(TransferJob("r", None, spec), 1, [0])
