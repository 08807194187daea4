"""Workarounds for vLLM's KV connectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def tell_of_connectors(adopt: Callable[[Any, Any, Any], None]) -> None:
    """Have each KV connector shown to `adopt`, with its configurations, when vLLM has made it.

    Why: a connector knows cache specs of vLLM's own classes alone, and takes a subclass of a sliding window for one.
    How: `KVConnectorFactory.create_connector` is wrapped, where LEXICO is asked for. Can go when a cache spec's manager
    says which of its pages a connector stores and loads.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    original = KVConnectorFactory.create_connector
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def create_connector(config: Any, role: Any, kv_cache_config: Any) -> Any:
        connector = original(config, role, kv_cache_config)
        adopt(connector, config, kv_cache_config)
        return connector

    create_connector.lexico = True  # type: ignore[attr-defined]
    KVConnectorFactory.create_connector = staticmethod(create_connector)
