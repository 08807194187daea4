"""Which KV connectors bring a prompt's first full-precision tokens with its codes, and with which of their settings."""

from __future__ import annotations

from typing import Any

from vllm_lexico.config import LexicoConfig
from vllm_lexico.errors import either, shown

_CAPACITY = ("cpu_bytes_to_use", "cpu_bytes_to_use_per_rank")
SETTINGS = {  # of `kv_connector_extra_config` that are known to be right, by connector
    "OffloadingConnector": (
        *_CAPACITY,
        "eviction_policy",
        "store_threshold",
        "max_tracker_size",
        "offload_prompt_only",
    ),
    "SimpleCPUOffloadConnector": _CAPACITY,
    "NixlConnector": ("backends", "num_threads", "kv_lease_duration", "engine_ttl"),
}
VALUES = {  # of other settings, values that say what is so without them
    "spec_name": "CPUOffloadingSpec",
    "blocks_per_chunk": 1,
    "canonical_layout": False,
    "sync_load_budget_bytes": 0,
    "lazy_offload": False,
    "kv_offload_backend": "cpu",
    "bidirectional_kv_xfer": False,
    "enforce_handshake_compat": True,
}
NO_HOST_BUFFER = (
    "NixlConnector's kv_buffer_device 'cpu' is not supported on a GPU: its copies are cut as a window is, without the "
    "first tokens; leave it out of --kv-transfer-config"
)


def connector_refusals(vllm_config: Any, flag: str) -> list[str]:
    """Reasons that lie in the KV connector, of an engine that has vLLM's hybrid KV cache manager.

    Args:
        vllm_config: vLLM's `VllmConfig`, read only, with a connector.
        flag: with which the user asked for it.
    """
    given = vllm_config.kv_transfer_config
    name = given.kv_connector
    if name not in SETTINGS or getattr(given, "kv_connector_module_path", None):
        other = f"use {either(SETTINGS)}, or start without {flag}"
        return [f"KV connector {name} is not supported: it would bring codes without their first tokens; {other}"]
    extra = getattr(given, "kv_connector_extra_config", None) or {}
    unknown = [key for key in extra if key not in SETTINGS[name] and (key not in VALUES or extra[key] != VALUES[key])]
    reasons = [
        f"{name}'s setting {shown(key)} as {shown(extra[key])} is not known to keep codes and first tokens together; "
        f"leave it out, allowed are {either(SETTINGS[name])}"
        for key in unknown
    ]
    config = LexicoConfig.from_additional_config(vllm_config.additional_config)
    if config.coded_later:
        reasons.append(
            f"KV connector {name} takes blocks when a step ends, which coded_later leaves uncoded; remove coded_later, "
            f"or start without {flag}"
        )
    if config.prefix_hits != "codes":
        reasons.append(
            f"""KV connector {name} brings no window, which prefix_hits "{config.prefix_hits}" asks for; """
            f"""set prefix_hits to "codes", or start without {flag}"""
        )
    if vllm_config.model_config.is_hybrid:
        reasons.append(f"KV connector {name} is not supported for models with states; start without {flag}")
    if getattr(given, "kv_load_failure_policy", "fail") != "fail":
        reasons.append(
            f"kv_load_failure_policy {shown(given.kv_load_failure_policy)} is not supported: the pages that a failed "
            "load leaves have no window to go on from; leave it at 'fail'"
        )
    return reasons


def group_refusals(name: str, num_codes: int, num_tails: int, num_groups: int) -> list[str]:
    """Reasons that lie in the cache's groups: beside one of codes and one of tails there may be none.

    Args:
        name: of the connector.
        num_codes, num_tails, num_groups: groups of codes, of tails, and all.
    """
    if (num_codes, num_tails, num_groups) == (1, 1, 2):
        return []
    reason = (
        f"KV connector {name} is not supported where some layers are not coded: of {num_groups} cache groups "
        f"{num_codes} have codes and {num_tails} their full-precision tokens; start without the connector"
    )
    return [reason]
