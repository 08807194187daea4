"""A worker that knows what every page holds: it writes, codes and reads as LEXICO does, and checks what it reads."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import ModelRunnerOutput

from vllm_lexico.serve import coding_plan

VOCABULARY = 5


class Worker:
    """Writes, codes and reads pages as LEXICO's kernels do, for one layer, with a number in place of each vector."""

    def __init__(self, spec: Any, block_tokens: int, window_step: int = 1) -> None:
        self._waiting: list[tuple[str, int, int, int, int]] = []
        self.spec, self.block_tokens, self.window_step = spec, block_tokens, window_step
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, tuple[list[int], list[int]]] = {}
        self.memory: dict[int, tuple[str, list[int | None]]] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._contents: dict[str, tuple[list[int], list[int]]] = {}

    def run(self, scheduled: Any, computed: dict[str, int]) -> Any:
        """One step; the answer is a sampled token for each request whose known tokens are all computed."""
        new = scheduled.num_scheduled_tokens
        rows = [(name, computed[name], computed[name] + new[name]) for name in new]
        contents = {name: self._content(name, end) for name, _, end in rows}
        if rows:  # else vLLM runs no model, and nothing of ours
            self._code()
        is_decode = all(end - start == 1 for _, start, end in rows)
        for name, start, end in rows:
            for position in range(start, end):
                self._write("raw", self.tables[name][1], self.spec.block_size, position, contents[name][position])
        if rows and not is_decode:
            self._plan(rows, contents, from_batch=True)
            if not self.spec.coded_later:
                self._code()
        starts = self._raw_starts(rows) if rows else []
        for (name, start, end), raw_start in zip(rows, starts, strict=True):
            self._read(name, start, end if is_decode else start, raw_start, contents[name])
        if rows and is_decode:
            self._plan(rows, contents, from_batch=False)
            self._code()
        sampled = [self._sample(name, end, contents[name]) for name, _, end in rows]
        names = list(new)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)

    def update(self, scheduled: Any, scheduler: Any) -> dict[str, int]:
        """Take over what vLLM sends; how many tokens of each scheduled request are computed."""
        computed = {}
        for name in scheduled.finished_req_ids:
            self.tokens.pop(name, None)
        for request in scheduled.scheduled_new_reqs:
            name = request.req_id
            self.tokens[name] = list(request.prompt_token_ids)
            self.tables[name] = tuple(list(ids) for ids in request.block_ids)
            computed[name] = request.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            ids = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self.tokens[name] = list(scheduler.requests[name].all_token_ids)
                self.tables[name] = tuple(list(each) for each in ids)
            elif ids is not None:
                for table, new in zip(self.tables[name], ids, strict=True):
                    table.extend(new)
            computed[name] = cached.num_computed_tokens[i]
        return computed

    def _content(self, name: str, end: int) -> list[int]:
        """The number of every prefix of a request up to `end` tokens."""
        tokens = self.tokens[name][:end]
        known, contents = self._contents.get(name, ([], []))
        if known != tokens[: len(known)]:
            known, contents = [], []
        contents = contents[:end]
        for token in tokens[len(contents) :]:
            above = contents[-1] if contents else 0
            contents.append(self._numbers.setdefault((above, token), len(self._numbers) + 1))
        self._contents[name] = tokens, contents
        return contents

    def _write(self, kind: str, table: list[int], page_tokens: int, position: int, content: int) -> None:
        page = table[position // page_tokens]
        if page == 0:
            assert kind == "raw", "a code has no page"
            return
        if self.memory.get(page, ("",))[0] != kind:
            self.memory[page] = kind, [None] * page_tokens
        self.memory[page][1][position % page_tokens] = content

    def _read(self, name: str, start: int, end: int, raw_start: int, contents: list[int]) -> None:
        """Sinks and window from the tail, all between from codes; `end` includes new tokens that lie in the tail."""
        spec, (codes, tail) = self.spec, self.tables[name]
        sink_end = min(spec.sink_blocks * spec.block_size, start)
        raw_start = min(raw_start, start)
        for kind, table, size, first, last in (
            ("raw", tail, spec.block_size, 0, sink_end),
            ("code", codes, self.block_tokens, sink_end, raw_start),
            ("raw", tail, spec.block_size, max(sink_end, raw_start), end),
        ):
            for page in range(first // size, -(-last // size) if first < last else 0):
                low, high = max(first, page * size), min(last, page * size + size)
                held = self.memory.get(table[page], ("nothing", []))
                slots = held[1][low - page * size : high - page * size]
                assert held[0] == kind and slots == contents[low:high], (
                    f"{name} reads wrong {kind} at {low} to {high} of {start}, raw from {raw_start}: {held[0]} {slots}"
                )

    def _batch(self, rows: list[tuple[str, int, int]]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        query_start = torch.tensor([0, *(end - start for _, start, end in rows)], dtype=torch.int32).cumsum(0).int()
        tables = []
        for group in (0, 1):
            width = max(len(self.tables[name][group]) for name, _, _ in rows)
            table = [self.tables[name][group] + [0] * (width - len(self.tables[name][group])) for name, _, _ in rows]
            tables.append(torch.tensor(table, dtype=torch.int32))
        return query_start, torch.tensor([end for _, _, end in rows], dtype=torch.int32), tables

    def _raw_starts(self, rows: list[tuple[str, int, int]]) -> list[int]:
        query_start, seq_lens, (_, tail) = self._batch(rows)
        size = self.spec.block_size
        sink_end = self.spec.sink_blocks * size
        starts = coding_plan.raw_starts(
            query_start,
            seq_lens,
            tail,
            window_tokens=self.spec.window_tokens,
            tail_tokens=size,
            sink_end=sink_end,
            block_tokens=self.window_step,
        )
        return [int(start) for start in starts]

    def _plan(self, rows: list[tuple[str, int, int]], contents: dict[str, list[int]], *, from_batch: bool) -> None:
        """What `plan_coding` says is to be coded, from the batch or from tail pages."""
        query_start, seq_lens, (codes, tail) = self._batch(rows)
        request, position = coding_plan.locate_tokens(query_start, seq_lens, int(query_start[-1]))
        plan = coding_plan.plan_coding(request, position, codes, self.block_tokens)
        size = self.spec.block_size
        sources = plan.sources(query_start, tail, size, from_batch=from_batch).tolist()
        targets = plan.destinations(codes, self.block_tokens).tolist()
        where = zip(plan.request.tolist(), plan.position.tolist(), sources, targets, strict=True)
        for index, at, source, target in where:
            if target < 0:
                continue
            name, start, _ = rows[index]
            if source >= 0:
                assert at >= start and source == query_start[index] + at - start
            assert target // self.block_tokens == self.tables[name][0][at // self.block_tokens]
            self._waiting.append((name, at, source, target, contents[name][at]))

    def _code(self) -> None:
        """Code what was planned; the tail pages that it comes from must hold it."""
        size = self.spec.block_size
        for name, at, source, target, content in self._waiting:
            if source < 0:
                kind, slots = self.memory.get((-1 - source) // size, ("nothing", [None] * size))
                right = kind == "raw" and slots[(-1 - source) % size] == content
                assert right, f"{name} codes position {at} from a page that holds something else"
            page, offset = divmod(target, self.block_tokens)
            self._write("code", [page], self.block_tokens, offset, content)
        self._waiting.clear()

    def _sample(self, name: str, end: int, contents: list[int]) -> list[int]:
        tokens = self.tokens[name]
        if end < len(tokens):
            return []
        tokens.append(contents[-1] * 2654435761 % 2**32 * VOCABULARY >> 32)
        return [tokens[-1]]
