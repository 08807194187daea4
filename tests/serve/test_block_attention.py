"""With the setting "same" a token's block alone decides what it reads raw, however chunks and hits cut its prompt."""

import itertools

import pytest
import torch
from lexico_kernels import CodeLayout, RequestTables, ops
from lexico_kernels.testing import poisoned_cache, random_problem

pytest.importorskip("vllm")
from vllm_lexico.serve.block_attention import attend_blocks
from vllm_lexico.serve.block_plan import plan_blocks
from vllm_lexico.serve.coding_plan import Reach, raw_starts
from vllm_lexico.serve.layer_parts import LayerParts

P, D, HEADS, GROUP = 64, 64, 2, 2
LENGTHS = (330, 71)
LAYOUT = CodeLayout(
    head_dim=D, num_kv_heads=HEADS, key_sparsity=3, value_sparsity=3, codec="packed16", block_tokens=P, element_bytes=4
)
R = LAYOUT.tail_tokens
BLOCKS, PAGES = -(-max(LENGTHS) // P), -(-max(LENGTHS) // R)
SCALE = 0.3
CUTS = {  # ends of the chunks of each request
    "one chunk": [[330], [71]],
    "chunks of 64": [[64, 128, 192, 256, 320, 330], [64, 71]],
    "odd chunks": [[1, 100, 101, 230, 330], [63, 65, 71]],
    "with hits": [[192, 330], [64, 71]],
}


class Sequences:
    """Requests of random tokens, computed in steps; of their pages only those exist that serving keeps."""

    def __init__(self, window, sink_pages, coded):
        self.coded, self.codes = coded.cache.code_pages, coded.tables.block_table
        generator = torch.Generator().manual_seed(0)
        self.reach = Reach(P, R, window, sink_pages * R)
        self.cache = poisoned_cache(LAYOUT, 1 + len(LENGTHS) * max(BLOCKS, PAGES), atoms=64, dtype=torch.float32)
        self.key, self.value = torch.randn(2, len(LENGTHS), max(LENGTHS), HEADS, D, generator=generator)
        self.query = torch.randn(len(LENGTHS), max(LENGTHS), HEADS * GROUP, D, generator=generator)
        rows = torch.arange(len(LENGTHS))[:, None]
        self.tail = (1 + rows * PAGES + torch.arange(PAGES)).int()

    def step(self, requests, computed, written, tile_tokens):
        """Write, code and attend; the rows' results."""
        for request, start, end in zip(requests, computed, written, strict=True):
            self._write(request, start, end)
        table = torch.zeros(len(requests), PAGES, dtype=torch.int32)
        for row, (request, end) in enumerate(zip(requests, written, strict=True)):
            table[row, self._kept(end)] = self.tail[request, self._kept(end)]
            dropped = [page for page in range(PAGES) if page not in self._read_from(computed[row], end)]
            self.cache.tail_pages[self.tail[request, dropped].long()] = torch.nan
        # Pages that only this step reads are still in its table.
        for row, (request, start) in enumerate(zip(requests, computed, strict=True)):
            table[row, self._kept(start)] = self.tail[request, self._kept(start)]
        query_lens = [end - start for start, end in zip(computed, written, strict=True)]
        starts = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
        window = {"window_tokens": self.reach.window_tokens, "tail_tokens": R, "sink_end": self.reach.sink_end}
        raw_start = raw_starts(starts, torch.tensor(written), table, **window, block_tokens=P)
        sink_end = torch.full((len(requests),), self.reach.sink_end, dtype=torch.int32)
        tables = RequestTables(self.codes[requests], table, sink_end, raw_start)
        plan = plan_blocks(query_lens, written, 0, self.reach, tile_tokens, torch.device("cpu"))
        cut = list(zip(requests, computed, written, strict=True))
        query, key, value = (
            torch.cat([part[request, start:end] for request, start, end in cut])
            for part in (self.query, self.key, self.value)
        )
        out = torch.full_like(query, torch.nan)
        attend_blocks(query, key, value, LayerParts.of(self.cache), tables, plan, scale=SCALE, out=out)
        return out.split(query_lens)

    def _kept(self, end):
        """Pages of the sinks and of what serving retains once `end` tokens are computed."""
        first = max(end - self.reach.window_tokens - P, 0) // R
        return sorted({*range(self.reach.sink_end // R), *range(first, -(-end // R))} & set(range(-(-end // R))))

    def _read_from(self, start, end):
        return {*self._kept(start), *self._kept(end)}

    def _write(self, request, start, end):
        held = set(self._kept(end)) | set(self._kept(start))
        for position in range(start, end):
            if position // R in held:
                page = self.cache.tail_pages[self.tail[request, position // R].long(), :, position % R]
                page[:, 0], page[:, 1] = self.key[request, position], self.value[request, position]
        # No more is sure to be coded than whole blocks.
        pages = self.codes[request, start // P : end // P].long()
        self.cache.code_pages[pages] = self.coded[pages]

    def expected(self):
        """Attention of every query by the rule, one after another."""
        results = []
        for request, length in enumerate(LENGTHS):
            self._write(request, 0, length // P * P)
            position = torch.arange(length // P * P, dtype=torch.int32)
            coded = torch.empty(2, len(position), HEADS, D)
            none = torch.zeros(len(LENGTHS), dtype=torch.int32)
            tables = RequestTables(self.codes, self.tail, none, none + length)
            ops.reconstruct(self.cache, tables, torch.full_like(position, request), position, coded[0], coded[1])
            rows = [self._expected_row(request, p, coded) for p in range(length)]
            results.append(torch.stack(rows))
        return results

    def _expected_row(self, request, position, coded):
        seen = torch.stack([self.key[request, : position + 1], self.value[request, : position + 1]])
        block = position // P * P
        first = max(max(block - self.reach.window_tokens, 0) // R * R, self.reach.sink_end)
        if first > self.reach.sink_end:
            seen[:, self.reach.sink_end : first] = coded[:, self.reach.sink_end : first]
        keys, values = seen.repeat_interleave(GROUP, 2)
        weights = (torch.einsum("hd,khd->hk", self.query[request, position], keys) * SCALE).softmax(1)
        return torch.einsum("hk,khd->hd", weights, values)


@pytest.fixture(scope="module")
def coded():
    """Codes of all requests. They need not be those of the tokens that are raw."""
    return random_problem(LAYOUT, LENGTHS, atoms=64, dtype=torch.float32, sink_pages=0, raw_tokens=0)


@pytest.fixture(scope="module", params=[(63, 1), (100, 0), (63, 3 * P // R), (1000, 1)], ids=str)
def case(request, coded):
    """A window, sink pages and codes, and the attention by the rule."""
    settings = (*request.param, coded)
    return settings, Sequences(*settings).expected()


@pytest.mark.parametrize("tile_tokens", [1, 100_000])
@pytest.mark.parametrize("cut", CUTS)
def test_a_token_reads_the_same_however_its_prompt_is_cut(case, cut, tile_tokens):
    settings, expected = case
    sequences = Sequences(*settings)
    found = [[] for _ in LENGTHS]
    computed = [0] * len(LENGTHS)
    for step in range(max(map(len, CUTS[cut]))):
        requests = [request for request, ends in enumerate(CUTS[cut]) if step < len(ends)]
        written = [CUTS[cut][request][step] for request in requests]
        results = sequences.step(requests, [computed[request] for request in requests], written, tile_tokens)
        for request, end, result in zip(requests, written, results, strict=True):
            found[request].append(result)
            computed[request] = end
    for rows, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), wanted, rtol=1e-5, atol=1e-5)


def test_codes_are_rebuilt_once_and_pieces_share_launches():
    """A chunk of 8,192 tokens takes one launch for its codes and one per tile of raw keys."""
    plan = plan_blocks([8192, 0], [8192, 0], 3, Reach(128, 16, 128, 16), 16384, torch.device("cpu"))
    assert plan.num_tokens == 8192 and len(plan.raw) == len(plan.coded) == 1 and len(plan.all_coded) == 5
    (tile,) = plan.coded
    assert tile.token_position.tolist() == list(range(8192 - 256))[: len(tile.token_position)]
    assert set(tile.token_request.tolist()) == {3} and tile.rows.stop == 8192
    assert tile.keys.longest == tile.keys.lengths[-1] == 8192 - 256
    assert len(plan.raw[0].key_row) <= 2 * 8192
