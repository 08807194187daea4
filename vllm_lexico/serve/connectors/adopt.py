"""Gives vLLM's connectors LEXICO's rules for the tail, where an engine's cache has one."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from vllm_lexico import last_word
from vllm_lexico.serve import refusals
from vllm_lexico.serve.allowed_connectors import NO_HOST_BUFFER, group_refusals
from vllm_lexico.serve.connectors.identity import engine_identity
from vllm_lexico.serve.tail_pages import LexicoTailSpec
from vllm_lexico.serve.wiring import connectors as wiring


@last_word.kept()
def adopt(connector: Any, vllm_config: Any, kv_cache_config: Any) -> None:
    """Change a connector that vLLM has just made; one for a cache without tails stays as it is.

    The parts of a connector get a subclass of their own class, so that they keep what vLLM set up in them.

    Args:
        connector: of any class of `allowed_connectors.SETTINGS`.
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: vLLM's plan of the cache.

    Raises:
        ValueError: the cache has groups that are no codes and no tails.
    """
    wiring.check_groups()
    specs = [_one_of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    tails = [spec for spec in specs if isinstance(spec, LexicoTailSpec)]
    if not tails:
        return
    codes = [spec for spec in specs if type(spec) is FullAttentionSpec]
    name = vllm_config.kv_transfer_config.kv_connector
    refusals.refuse(group_refusals(name, len(codes), len(tails), len(specs)))
    if name == "OffloadingConnector":
        from vllm_lexico.serve.connectors import offloading

        wiring.check_offloading(offloading.OffloadingConnectorScheduler, offloading.SinksWithCodes)
        _become(connector.connector_scheduler, offloading.SinksWithCodes)
    elif name == "SimpleCPUOffloadConnector":
        from vllm_lexico.serve.connectors import simple_cpu

        wiring.check_simple_cpu(simple_cpu.SimpleCPUOffloadScheduler, simple_cpu.SinksWithCodes)
        _become(connector.scheduler_manager, simple_cpu.SinksWithCodes)
    else:
        assert name == "NixlConnector", f"{name} was not refused"
        from vllm_lexico.serve.connectors import nixl

        wiring.check_nixl(nixl.NixlPullConnectorScheduler, nixl.WholeBlocks, nixl.NixlPullConnectorWorker)
        part = connector.connector_scheduler or connector.connector_worker
        refusals.refuse([NO_HOST_BUFFER] if part.use_host_buffer else [])
        _become(connector, nixl.WholeBlocksConnector)
        _become(connector.connector_scheduler, nixl.WholeBlocks)
        if connector.connector_worker is not None:
            said = engine_identity(vllm_config, tails[0], codes[0].block_size)
            _become(connector.connector_worker, nixl.AgreeingWorker, said)


def _one_of(spec: Any) -> Any:
    """A layer's cache spec of a group where a worker is told each: beside raw pages of drafts."""
    return next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _become(part: Any, kind: Any, *args: Any) -> None:
    """Let a part of a connector, None in processes that have it not, be of a subclass of its own class."""
    if part is None:
        return
    assert type(part) in kind.__mro__, f"{type(part).__name__} is not what {kind.__module__} changes"
    part.__class__ = kind
    part.become(*args)
