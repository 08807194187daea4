"""Copies between the pool and host memory for engines on a CPU, where vLLM's offloading connectors want a GPU.

vLLM's schedulers, its bookkeeping of host memory and its jobs are as they are; what is here is the copy of a block.
"""

from __future__ import annotations

import time
import types
from typing import Any

import torch


class HostWorker:
    """vLLM's `OffloadingWorker` with copies that are done when they are asked for."""

    def __init__(self, caches: Any, num_chunks: int) -> None:
        self.pool = [tensor.tensor for tensor in caches.tensors]
        self.groups = [[ref.tensor_idx for ref in refs] for refs in caches.group_data_refs]
        self.host = [torch.zeros(num_chunks, tensor.shape[1], dtype=torch.int8) for tensor in self.pool]
        self.done: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, src_spec, dst_spec, self.pool, self.host)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, dst_spec, src_spec, dst_spec, self.host, self.pool)

    def _copy(self, job_id: int, of_groups: Any, source: Any, target: Any, read: list, written: list) -> bool:
        from vllm.v1.kv_offload.base import TransferResult

        began, copied, places = time.perf_counter(), 0, iter(zip(source.block_ids, target.block_ids, strict=True))
        for tensors, size in zip(self.groups, of_groups.group_sizes, strict=True):
            for _ in range(size):
                here, there = next(places)
                for index in tensors:
                    written[index][there] = read[index][here]
                    copied += read[index].shape[1]
        self.done.append(TransferResult(job_id, True, copied, time.perf_counter() - began))
        return True

    def get_finished(self) -> list[Any]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Nothing to close."""


class NoStream:
    """A stream of a device that has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class NoEvent:
    """What is past when it is recorded."""

    def record(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class HostCopies:
    """vLLM's `DmaCopyBackend` with copies that are done when they are asked for."""

    def init(self, pool: dict, host: dict, *args: Any) -> None:
        self.pairs = [(pool[name], host[name]) for name in pool]

    def launch_copy(
        self, src_blocks: list, dst_blocks: list, *, is_store: bool, event_idx: int, events_list: list, **kwargs: Any
    ) -> None:
        for pool, host in self.pairs:
            read, written = (pool, host) if is_store else (host, pool)
            written[dst_blocks] = read[src_blocks]
        events_list.append((event_idx, NoEvent()))

    def shutdown(self) -> None:
        """Nothing to close."""


def copy_on_the_host() -> None:
    """Let vLLM's offloading connectors run in this process without a GPU."""
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.simple_kv_offload import worker

    def get_worker(self: Any, kv_caches: Any) -> HostWorker:
        return HostWorker(kv_caches, self.num_chunks)

    CPUOffloadingSpec.get_worker = get_worker
    cuda = types.SimpleNamespace(Stream=NoStream, current_stream=NoStream)
    worker.torch = types.SimpleNamespace(**vars(torch) | {"cuda": cuda, "Event": NoEvent})
    worker.DmaCopyBackend = HostCopies
