"""Every workaround for vLLM: why it is there, how it works, and when it can go.

Those that other modules use are functions here, in `layers.py` those that change what vLLM's own layers ask for, and in
`connectors.py` those for KV connectors.
Those that are part of another module's own work stay there and are listed in `elsewhere.py`. What LEXICO relies on
without working around it is in the tables of `serve/wiring/`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm_lexico.versions import VLLM_CPU

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

TESTED_VLLM = ("0.32", "0.33")
logger = logging.getLogger("vllm.lexico")  # only loggers below "vllm" have a handler


def register(name: str, path: str, check: Callable[[Any, str], None]) -> None:
    """Make `name` an attention backend of this vLLM; where that is impossible, warn once and stay out of the way.

    vLLM loads this package in every process of an installation, LEXICO or not, and an error here would end them all.
    The name comes last: where anything before it fails the name stays unknown, and vLLM refuses it when it is asked
    for, and only then.

    Args:
        name: what users say.
        path: of the backend's class.
        check: for `check_engine_configs`.
    """
    try:
        _register(name, path, check)
    except Exception as error:
        _warn_once(_unavailable(name, error))


def _register(name: str, path: str, check: Callable[[Any, str], None]) -> None:
    let_cpu_platform_select(name, path)
    check_engine_configs(check)
    register_backend_name(name, path)


def registered_member(refusal_file: str | None = None) -> AttentionBackendEnum:
    """The registry member LEXICO; registers it first where it is unknown. What pickled configs unpickle to.

    Args:
        refusal_file: where the process that made the configuration reads what to end with, see `last_word`.

    Raises:
        ValueError: it cannot be registered with this vLLM.
    """
    from vllm_lexico import BACKEND, NAME, _adopt_connector, _check_before_start, last_word
    from vllm_lexico.compat import connectors, layers

    try:
        _register(NAME, BACKEND, _check_before_start)
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        member = AttentionBackendEnum[NAME]
    except Exception as error:
        raise ValueError(_unavailable(NAME, error)) from error
    last_word.inherit(refusal_file)
    layers.let_vllm_keep_its_layers()
    connectors.tell_of_connectors(_adopt_connector)
    return member


def _unavailable(name: str, error: Exception) -> str:
    return (
        f"{name} is not available, all else is as it was: this is vLLM {vllm_version()}, which registers backends "
        f"otherwise than {tested_vllm()} ({type(error).__name__}: {error}); to use {name} install one of those"
    )


@functools.cache
def _warn_once(sentence: str) -> None:
    logger.warning(sentence)


def tested_vllm() -> str:
    """The tested versions, in words."""
    return " and ".join(TESTED_VLLM)


def is_tested(version: str) -> bool:
    """Whether a version of vLLM is one of the tested ones."""
    return ".".join(version.split(".")[:2]) in TESTED_VLLM


def vllm_version() -> str:
    """The version of the vLLM that is installed."""
    import vllm

    return getattr(vllm, "__version__", "of unknown version")


def does_not_fit(what: str) -> ValueError:
    """The sentence that ends a start with a vLLM that LEXICO does not fit; `what` says why."""
    from vllm_lexico import last_word

    if is_tested(vllm_version()):
        advice = "It was tested with this version, which something has changed, a plugin or a patch: start without it"
    else:
        advice = f"It was tested with vLLM {tested_vllm()}: install one of those"
    sentence = f"LEXICO does not fit vLLM {vllm_version()}: {what}. {advice}, or choose another --attention-backend"
    last_word.say(sentence)
    return ValueError(sentence)


@contextlib.contextmanager
def failures_in_a_sentence(what: str) -> Iterator[None]:
    """Any error meanwhile is one of this vLLM's being another than those tested.

    Raises:
        ValueError: `does_not_fit`, with `what` and the error.
    """
    try:
        yield
    except Exception as error:
        raise does_not_fit(f"{what} ends with {type(error).__name__}: {error}") from error


def register_backend_name(name: str, path: str) -> None:
    """Add `name` to vLLM's attention backends so that it survives a spawned process.

    Why: a spawned engine unpickles its config before it loads plugins, and an enum member unpickles by a value that
    the fresh process does not know. How: our member pickles as a call of `registered_member`, whose import registers
    it. Can go when vLLM loads general plugins before it unpickles (vllm-project/vllm#41091 added the names).
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_lexico import last_word

    if name in AttentionBackendEnum.__members__:
        return
    register_backend(name, path)
    try:
        member = AttentionBackendEnum[name]
        member.__reduce_ex__ = lambda _protocol: (registered_member, (last_word.path(),))
        if member.get_path() != path or registered_member.__name__.encode() not in pickle.dumps(member):
            raise TypeError("a registered name does not keep its class or its way of pickling")
    except Exception:
        _forget_backend_name(name)  # known here and unknown where it is unpickled is worse than unknown everywhere
        raise


def _forget_backend_name(name: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member: Any = AttentionBackendEnum._member_map_.pop(name, None)
    if member is None:
        return
    AttentionBackendEnum._member_names_.remove(name)
    AttentionBackendEnum._value2member_map_.pop(member.value)
    delattr(AttentionBackendEnum, name)


def let_cpu_platform_select(name: str, path: str) -> None:
    """Let the CPU platform choose our backend; it takes CPU_ATTN whatever the user named.

    How: `CpuPlatform.get_attn_backend_cls` is wrapped and answers for our name only, after the same validation that
    the CUDA platform does. Can go when the CPU platform honours registered backends.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    if "get_attn_backend_cls" not in vars(CpuPlatform):
        raise AttributeError("CpuPlatform has no get_attn_backend_cls of its own")
    original = CpuPlatform.get_attn_backend_cls
    if getattr(original, "lexico", False):
        return
    first_two = list(inspect.signature(original).parameters)[:2]
    if first_two != ["selected_backend", "attn_selector_config"]:
        raise TypeError(f"CpuPlatform.get_attn_backend_cls takes {first_two}")

    @functools.wraps(original)
    def get_attn_backend_cls(selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is None or selected_backend.name != name:
            return original(selected_backend, attn_selector_config, *args, **kwargs)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=DeviceCapability(0, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Selected backend {name} is not valid for this configuration. Reason: {reasons}")
        return path

    get_attn_backend_cls.lexico = True  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


def check_engine_configs(check: Callable[[Any, str], None]) -> None:
    """Have configurations that ask for LEXICO checked where they are made: in the process that the user started.

    Why: vLLM validates an attention backend in its workers, whose exceptions never reach the user's process. How:
    `EngineArgs.create_engine_config`, which `LLM` and `vllm serve` call before they spawn anything, hands what it made
    to `check`, with --kv-cache-dtype as it was given. Where LEXICO is not asked for it returns what vLLM returns.
    Plugins are loaded from that module or, in workers, without it. Can go when vLLM asks a backend about a
    configuration before it spawns.
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:
        return
    original = getattr(getattr(arguments, "EngineArgs", None), "create_engine_config", None)
    if original is None:
        logger.warning("LEXICO's settings are checked late: this vLLM has no EngineArgs.create_engine_config")
    if original is None or getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given_cache_dtype = getattr(self, "kv_cache_dtype", "auto")
        vllm_config = original(self, *args, **kwargs)
        if serves_lexico(vllm_config) or "lexico" in (getattr(vllm_config, "additional_config", None) or ()):
            check(vllm_config, given_cache_dtype)
        return vllm_config

    create_engine_config.lexico = True  # type: ignore[attr-defined]
    arguments.EngineArgs.create_engine_config = create_engine_config


def serves_lexico(vllm_config: Any) -> bool:
    """Whether any layers of an engine are to have LEXICO's backend."""
    from vllm_lexico import NAME

    attention = getattr(vllm_config, "attention_config", None)
    backends = [getattr(attention, "backend", None), *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", None) == NAME for backend in backends)


def repeat_refusals_last() -> None:
    """Let this process end with the refusal of a worker instead of "Engine core initialization failed".

    Why: a worker's exception goes to its log alone. How: `wait_for_engine_startup` is wrapped; when it fails and a
    worker left a sentence (see `last_word`), that is raised. Called where LEXICO is asked for. Can go when vLLM hands a
    worker's exception on.
    """
    from vllm.v1.engine import utils

    from vllm_lexico import last_word

    original = getattr(utils, "wait_for_engine_startup", None)
    if original is None or getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError as error:
            said = last_word.take()
            if not said:
                raise
            raise ValueError(said) from error

    wait_for_engine_startup.lexico = True  # type: ignore[attr-defined]
    utils.wait_for_engine_startup = wait_for_engine_startup


def ensure_builtin_cache_specs() -> None:
    """Register vLLM's own cache specs before ours.

    Why: its registry fills itself only while empty, so a spec of ours that comes first would leave it without
    FullAttentionSpec. Can go when `_ensure_registered` no longer looks at whether the table is empty.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def publish_events_of_whole_prefixes(manager: Any) -> None:
    """Let a pool's KV events tell of code blocks alone, each with its tokens and with a parent that was stored.

    Why: of a group that caches some blocks and not others, as a sliding window does, `cache_full_blocks` publishes the
    tokens of all with the hashes of some, below a parent that may never have been stored, and a router that follows
    goes wrong. It also registers and publishes the end of a prompt inside a block (`cache_partial_block`), which
    nothing finds where hits end at whole blocks. How: events of the tail's group are dropped when they are taken, and
    the pool takes of partial blocks only those that end with a whole one, as the states of some layers do; a hit is
    decided by the codes, as the tail's sinks are evicted after them. Can go when vllm-project/vllm#44451 (sparse
    groups) and #58119 (partial blocks) are fixed.

    Args:
        manager: of the tail's pages.
    """
    pool, tail_group_id = manager.block_pool, manager.kv_cache_group_id
    take_events, cache_partial_block = pool.take_events, pool.cache_partial_block

    def cache_whole(*args: Any, num_tokens: int, **kwargs: Any) -> Any:
        whole = num_tokens % manager.cache_hit_alignment_tokens == 0
        return cache_partial_block(*args, num_tokens=num_tokens, **kwargs) if whole else None

    pool.take_events = lambda: [event for event in take_events() if getattr(event, "group_idx", None) != tail_group_id]
    pool.cache_partial_block = cache_whole


@functools.cache
def warn_of_untested_version() -> None:
    """Log a warning, once a process, where vLLM is a version that this package was not tested with."""
    version = vllm_version()
    if not is_tested(version):
        logger.warning(
            "LEXICO was tested with vLLM %s; this is %s. If it fails, install a tested one.", tested_vllm(), version
        )


@contextlib.contextmanager
def cpu_build_known_as_vllm() -> Iterator[None]:
    """Let what is imported meanwhile ask for the version of "vllm" where vLLM is the CPU build, "vllm-cpu".

    Why: lm-evaluation-harness asks for the distribution's version while it is imported. How: the function that it
    imports answers for the name "vllm" with what vLLM itself takes for its version then. Can go when the CPU wheel's
    name is vllm.
    """
    original = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original(VLLM_CPU) + "+cpu"

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = original
