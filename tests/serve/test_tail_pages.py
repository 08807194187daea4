"""The tail's pages in vLLM's own block pool: what a request holds, gives back and finds again."""

import functools
import random
import types

import pytest

pytest.importorskip("vllm")
from tails import TAIL, WINDOW, make_manager

from vllm_lexico.serve.tail_pages import LexicoTailManager

POOL = 400  # pages
make = functools.partial(make_manager, POOL)


def schedule(manager, request, computed, new):
    """One step as vLLM's KVCacheManager does it; returns the pages it predicted and took."""
    manager.remove_skipped_blocks(request, computed)
    total = computed + new
    predicted = manager.get_num_blocks_to_allocate(request, total, [], computed, computed, total)
    free = manager.block_pool.get_num_free_blocks()
    manager.allocate_new_blocks(request, total, total)
    assert free - manager.block_pool.get_num_free_blocks() == predicted
    return predicted


def held(manager, request):
    return [i for i, block in enumerate(manager.req_to_blocks[request]) if not block.is_null]


def check_readable(manager, request, computed, new, sink_blocks=1, after_hit=False):
    """Everything that a step reads or must keep has a page: sinks, the window before it, the window after it."""
    pages = set(held(manager, request))
    total = computed + new
    needed = set(range(min(sink_blocks, -(-total // TAIL))))
    if not after_hit:  # then codes stand in for what the hit did not bring
        needed |= set(range(max(computed - WINDOW, 0) // TAIL, -(-computed // TAIL)))
    first_new = computed // TAIL if after_hit else 0
    needed |= set(range(max((total - WINDOW) // TAIL, first_new), -(-total // TAIL)))
    assert needed <= pages, needed - pages


@pytest.mark.parametrize("chunk", [1, 7, 64, 128, 500, 8192])
@pytest.mark.parametrize("sink_blocks", [0, 1, 2])
def test_a_request_holds_its_windows_and_sinks_whatever_the_chunk(chunk, sink_blocks):
    manager, _, _ = make(sink_blocks=sink_blocks)
    computed = 0
    while computed < 3000:
        schedule(manager, "r", computed, chunk)
        check_readable(manager, "r", computed, chunk, sink_blocks)
        assert len(held(manager, "r")) <= manager.max_admission_blocks_per_request
        computed += chunk
    for _ in range(200):  # decode
        schedule(manager, "r", computed, 1)
        check_readable(manager, "r", computed, 1, sink_blocks)
        computed += 1
    assert len(held(manager, "r")) <= WINDOW // TAIL + 2 + sink_blocks


def test_steps_under_way_keep_what_they_read():
    """With asynchronous scheduling pages are freed only by steps that have finished."""
    manager, _, _ = make(concurrent_batches=2)
    finished, computed, chunk = 0, 0, 1000
    for _ in range(6):
        manager.remove_skipped_blocks("r", finished)
        manager.allocate_new_blocks("r", computed + chunk, computed + chunk)
        check_readable(manager, "r", finished, computed - finished)
        check_readable(manager, "r", computed, chunk)
        assert len(held(manager, "r")) <= manager.max_admission_blocks_per_request
        finished, computed = computed, computed + chunk


@pytest.mark.parametrize("chunk", [1, 4, 100, 1000])
def test_pages_of_drafts_to_come_are_within_admission(chunk):
    """vLLM takes pages for the tokens that a model drafts next, beyond those of a step."""
    ahead = 7
    manager, _, spec = make(lookahead_tokens=ahead)
    manager.max_admission_blocks_per_request = spec.max_admission_blocks_per_request(chunk, 32768)
    for computed in range(0, 3000, chunk):
        manager.remove_skipped_blocks("r", computed)
        total = computed + chunk
        predicted = manager.get_num_blocks_to_allocate("r", total + ahead, [], computed, computed, total)
        free = manager.block_pool.get_num_free_blocks()
        manager.allocate_new_blocks("r", total + ahead, total)
        assert free - manager.block_pool.get_num_free_blocks() == predicted
        check_readable(manager, "r", computed, chunk)
        assert len(held(manager, "r")) <= manager.max_admission_blocks_per_request


def test_all_pages_come_back():
    manager, pool, _ = make()
    free = pool.get_num_free_blocks()
    for request in "abc":
        for computed in range(0, 2000, 100):
            schedule(manager, request, computed, 100)
    for request in "abc":
        manager.free(request)
    assert pool.get_num_free_blocks() == free


def cache_prompt(manager, num_tokens, page=TAIL):
    """Compute and cache a prompt, then finish its request."""
    request = types.SimpleNamespace(
        request_id="first",
        block_hashes=[f"hash{i}".encode() for i in range(num_tokens // page)],
        shared_prefix_boundary=0,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
    )
    schedule(manager, "first", 0, num_tokens)
    manager.cache_blocks(request, num_tokens // 128 * 128, retention_interval=0, replay_boundaries=(num_tokens - 1,))
    manager.free("first")
    return request.block_hashes


def find(manager, spec, hashes, max_length, drop_eagle_block=False, page=TAIL):
    (blocks,), length = LexicoTailManager.find_longest_cache_hit(
        hashes, max_length, [0], manager.block_pool, spec, drop_eagle_block=drop_eagle_block, alignment_tokens=128
    )
    assert len(blocks) * page == length
    return [i for i, block in enumerate(blocks) if not block.is_null], length


def test_a_hit_brings_its_sinks_and_the_window_where_it_is_cached():
    manager, _, spec = make()
    hashes = cache_prompt(manager, 1000)
    assert find(manager, spec, hashes, 896) == ([0, 54, 55], 896)  # the prompt's chunk kept its last 128 tokens
    assert find(manager, spec, hashes, 500) == ([0], 384)  # no window there: codes stand in


@pytest.mark.parametrize("length", [384, 896])
def test_beside_drafts_a_hit_is_that_of_codes(length):
    """vLLM asks for a page more than the codes' hit, from which it has taken the last block already."""
    manager, _, spec = make()
    hashes = cache_prompt(manager, 1000)
    asked = length + TAIL
    assert find(manager, spec, hashes, asked, drop_eagle_block=True) == find(manager, spec, hashes, length)
    exact, page = make(tail=128)[::2], 128
    hashes = cache_prompt(exact[0], 1000, page)
    assert find(*exact, hashes, length + page, drop_eagle_block=True, page=page)[1] == length


def test_strict_hits_need_the_window():
    manager, _, spec = make(window_hits=True)
    hashes = cache_prompt(manager, 1000)
    assert find(manager, spec, hashes, 896) == ([0, *range(48, 56)], 896)
    assert find(manager, spec, hashes, 500) == ([], 0)


def test_no_hit_without_sinks():
    manager, pool, spec = make()
    hashes = cache_prompt(manager, 1000)
    (sink,) = pool.get_cached_block(hashes[0], [0])
    pool.evict_blocks({sink.block_id})
    assert find(manager, spec, hashes, 896) == ([], 0)


def test_a_request_continues_from_a_hit():
    manager, pool, spec = make()
    hashes = cache_prompt(manager, 1000)
    (blocks,), length = LexicoTailManager.find_longest_cache_hit(
        hashes, 896, [0], pool, spec, drop_eagle_block=False, alignment_tokens=128
    )
    free = pool.get_num_free_blocks()
    predicted = manager.get_num_blocks_to_allocate("second", 1000, blocks, length, length, 1000)
    manager.add_local_computed_blocks("second", blocks, length, 0)
    manager.allocate_new_blocks("second", 1000, 1000)
    assert free - pool.get_num_free_blocks() == predicted
    check_readable(manager, "second", length, 1000 - length, after_hit=True)


@pytest.mark.parametrize(
    ("computed", "hit", "later"),
    [(255, 128, 0), (129, 128, 0), (128, 256, 0), (0, 256, 0), (255, 128, 1), (128, 128, 1), (127, 0, 1), (0, 0, 1)],
)
def test_no_hit_ends_with_a_block_that_the_step_completes(computed, hit, later):
    """Its codes come last in a step of decode, when readers of the same step have read; later steps find it.

    Where coding waits for the next step, that holds for every block.
    """
    manager, _, spec = make(coded_later=bool(later))
    request = types.SimpleNamespace(
        request_id="first",
        block_hashes=[f"hash{i}".encode() for i in range(256 // TAIL)],
        shared_prefix_boundary=0,
        num_prompt_tokens=256,
        num_computed_tokens=0,
    )
    for start, end in ((0, computed), (computed, 256)):
        manager.new_step_starts()
        schedule(manager, "first", start, end - start)
        request.num_computed_tokens = start
        manager.cache_blocks(request, end, retention_interval=0, replay_boundaries=(128,))
    assert find(manager, spec, request.block_hashes, 256)[1] == hit
    manager.new_step_starts()
    assert find(manager, spec, request.block_hashes, 256)[1] == 256


TEXT = [random.Random(0).randrange(2, 5) for _ in range(700)]


@pytest.mark.parametrize(("later", "hit"), [(False, 256), (True, 0)])
def test_where_coding_waits_a_prompt_hits_no_block_of_its_own_step(page_engine, later, hit):
    """The worker checks that what is read has been coded: in the same step, in the next, and when pages moved on."""
    engine = page_engine(later=later, max_model_len=700, chunk=700, spare_pages=40)
    engine.add("first", TEXT[:260], 20)
    engine.add("same step", TEXT[:280], 4)
    engine.step()
    assert engine.hits == {"first": 0, "same step": hit}
    engine.add("next step", TEXT[:300], 4)
    engine.abort("first")  # its pages are free while its codes wait
    engine.add("others", [3] * 300, 4)
    engine.step()
    assert engine.hits["next step"] == 256
    engine.finish()


@pytest.mark.parametrize("codec", ["packed16", "exact"])
def test_windows_of_hits_survive_vllms_plan(page_engine, codec):
    """vLLM plans the cache from the spec and sets fields of its own in it; hits with their window are found."""
    engine = page_engine(prefix_hits="window", codec=codec, max_model_len=700)
    assert engine.spec.extra_retained_tokens == 0  # what vLLM sets
    for name, prompt, hit in (
        ("first", TEXT[:610], 0),
        ("same again", TEXT[:610], 576),
        ("first of 64 tokens", TEXT[:577], 576),
    ):
        engine.add(name, prompt, 20)
        engine.finish()
        assert engine.hits[name] == hit
    engine.add("next turn", TEXT[:610] + engine.answers["first"] + TEXT[:60])
    engine.finish()
    assert engine.hits["next turn"] == 576


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("codec", ["packed16", "exact"])
def test_input_in_pieces_ends_in_the_smallest_pool(page_engine, codec, concurrent):
    """Four pieces of 150 tokens, 10 answered after each: what a resumed request holds counts for it."""
    engine = page_engine(codec=codec, max_model_len=700, concurrent=concurrent)
    for piece in range(4):
        engine.add("session", TEXT[piece * 150 : piece * 150 + 150], 10, resumable=True)
        engine.finish()
        assert len(engine.answers["session"]) == 10 * (piece + 1)
    engine.add("session", [0])
    engine.finish()
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_a_page_that_others_hold_is_not_counted_as_free_later():
    """It leaves a request's window and stays with the other, so a page for new tokens must come from elsewhere."""
    manager, pool, _ = make()
    hashes = cache_prompt(manager, 1000)
    (blocks,), length = LexicoTailManager.find_longest_cache_hit(
        hashes, 896, [0], pool, manager.kv_cache_spec, drop_eagle_block=False, alignment_tokens=128
    )
    manager.add_local_computed_blocks("other", blocks, length, 0)
    needed = manager.get_num_blocks_to_allocate("new", 4000, blocks, length, length, 4000, apply_admission_cap=True)
    assert needed == manager.max_admission_blocks_per_request - 1  # the sink alone stays shared


@pytest.mark.parametrize("concurrent", [False, True])
def test_events_are_of_code_blocks_with_their_tokens_and_parents(page_engine, concurrent):
    """What a router follows: `PageEngine._follow` and `check` compare every event with what is stored."""
    engine = page_engine(concurrent=concurrent, max_model_len=700)
    for turn in range(4):
        engine.add(f"turn {turn}", TEXT[turn // 2 : 300 + 80 * turn], 70)
        engine.finish()
    assert engine.published[0].total() > 5 and not engine.published[1]
    assert engine.scheduler.reset_prefix_cache()
    engine.check()
    assert not engine.published[0]


def test_events_of_a_hit_are_of_code_blocks(page_engine):
    """A request may ask that blocks it takes from the cache are published again."""
    engine = page_engine(max_model_len=700, spare_pages=40)
    for name in ("first", "again"):
        engine.add(name, TEXT[:300], extra_args={"kv_cache_report_mode": "full"})
        engine.finish()
    assert engine.hits["again"] == 256 and not engine.published[1]
    assert max(engine.published[0].values()) == 2
