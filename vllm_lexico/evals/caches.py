"""Caches by their names on the command line, and the engine arguments that each stands for.

lexico:S                   LEXICO with S atoms per vector; lexico:K/V with K for keys and V for values
bf16                       the cache as the model computes it
fp8, turboquant_4bit_nc    any other of vLLM's --kv-cache-dtype by its name
NAME+option=value          a setting of LEXICO (lexico:15+window=32+sinks=0), or of any cache: block_size, backend;
                           uneven=low/high, as lexico:7+uneven=3/15
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any

from vllm_lexico import NAME
from vllm_lexico.config import LexicoConfig

REFERENCE = "bf16"  # what every other cache is compared with
LEXICO = "lexico"
LONGEST_NAME = 200  # it names a folder
# The values of --kv-cache-dtype begin with these. vLLM knows which it has; asking it here would take ten seconds.
DTYPE_PREFIXES = ("fp8", "int4", "int8", "nvfp4", "turboquant_")
ENGINE_OPTIONS = {"block_size": "block_size", "backend": "attention_backend"}
SETTINGS = tuple(field.name for field in fields(LexicoConfig) if field.name != "sparsity")
_ALLOWED = (
    f"allowed: lexico:S, lexico:K/V, {REFERENCE}, or a --kv-cache-dtype of vLLM ({'*, '.join(DTYPE_PREFIXES)}*), each "
    f"with +option=value after it"
)


@dataclass(frozen=True)
class Cache:
    """A cache to evaluate.

    name: as it was given; what results call it.
    engine: the arguments of vLLM's engine that choose it.
    """

    name: str
    engine: dict[str, Any]

    @property
    def family(self) -> str:
        """What it shares a line in the picture with: lexico, bf16, fp8, turboquant, ..."""
        return re.split(r"[:+_]", self.name)[0]

    @property
    def folder(self) -> str:
        """Name of the folder that has its results."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", self.name).strip("-.")

    @property
    def dictionary(self) -> str | None:
        """What it names as LEXICO's dictionary; None where it names none."""
        return self._of_lexico.get("dictionary")

    @property
    def engine_without_dictionary(self) -> dict[str, Any]:
        """The arguments of vLLM's engine but for what `dictionary` is."""
        if self.dictionary is None:
            return self.engine
        settings = {name: value for name, value in self._of_lexico.items() if name != "dictionary"}
        return self.engine | {"additional_config": self.engine["additional_config"] | {LEXICO: settings}}

    @property
    def _of_lexico(self) -> dict[str, Any]:
        """LEXICO's settings; none in what a file has in their place."""
        config = self.engine.get("additional_config")
        settings = config.get(LEXICO) if isinstance(config, dict) else None
        return settings if isinstance(settings, dict) else {}


def parse_cache(name: str, dictionary: str | None = None) -> Cache:
    """Read a cache's name (see the module).

    Args:
        name: as the user gave it.
        dictionary: what LEXICO uses where the name does not say another; None searches for the model's.

    Raises:
        ValueError: the name is no cache, or an option of it is unknown or has a value that is not allowed.
    """
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(
            f"cache {ascii(name)[:80]} has more than {LONGEST_NAME} letters or control characters; {_ALLOWED}"
        )
    head, *given = name.strip().split("+")
    kind, _, numbers = head.partition(":")
    options = _options(name, given)
    engine = {argument: options.pop(option) for option, argument in ENGINE_OPTIONS.items() if option in options}
    if kind == LEXICO:
        settings = {"sparsity": _sparsity(name, numbers), **options}
        if settings.get("codec") == "exact":
            del settings["sparsity"]  # the name has one, the codec takes none
        elif dictionary is not None:
            settings.setdefault("dictionary", dictionary)
        LexicoConfig.from_additional_config({LEXICO: settings})
        if "attention_backend" in engine:
            raise ValueError(f"cache {name!r} has another backend; allowed: lexico without backend=; remove it")
        return Cache(name.strip(), {"attention_backend": NAME, "additional_config": {LEXICO: settings}} | engine)
    if options:
        known = ", ".join(ENGINE_OPTIONS)
        raise ValueError(f"cache {name!r} has no option {', '.join(options)}; allowed: {known}; correct or remove it")
    if head == REFERENCE:
        return Cache(name.strip(), {"kv_cache_dtype": "auto"} | engine)
    if not head.startswith(DTYPE_PREFIXES) or not re.fullmatch(r"\w+", head):
        raise ValueError(f"cache {name!r} is unknown; {_ALLOWED}")
    return Cache(name.strip(), {"kv_cache_dtype": head} | engine)


def parse_caches(names: str, dictionary: str | None = None) -> list[Cache]:
    """Read names separated by commas; ValueError as `parse_cache`, and where two would share a folder of results."""
    caches = [parse_cache(name, dictionary) for name in names.split(",") if name.strip()]
    if not caches:
        raise ValueError(f"no cache was given; {_ALLOWED}")
    owner: dict[str, str] = {}
    for cache in caches:
        other = owner.setdefault(cache.folder.lower(), cache.name)
        if other != cache.name or [each.name for each in caches].count(cache.name) > 1:
            raise ValueError(f"caches {other} and {cache.name} would share a folder; allowed: each once; remove one")
    return caches


def _options(name: str, given: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for words in given:
        option, equals, value = words.partition("=")
        if not equals or option in options or option not in (*SETTINGS, *ENGINE_OPTIONS):
            known = ", ".join((*ENGINE_OPTIONS, *SETTINGS))
            raise ValueError(f"cache {name!r}: +{words} is no option, or given twice; allowed: {known}, as +name=value")
        options[option] = _pair(value) if option == "uneven" else _value(value)
    return options


def _pair(words: str) -> Any:
    """low/high as the setting `uneven` takes it, which itself checks it."""
    return [_value(number) for number in words.split("/")]


def _value(words: str) -> Any:
    """A number where it is one, else the words themselves."""
    try:
        value = json.loads(words)
    except (ValueError, RecursionError):  # also for a number of 5,000 digits
        return words
    return value if isinstance(value, int | float) and not isinstance(value, bool) else words


def _sparsity(name: str, numbers: str) -> Any:
    """S or K/V as the setting `sparsity` takes it; the setting itself checks the range."""
    if not re.fullmatch(r"\d{1,9}(/\d{1,9})?", numbers):
        raise ValueError(f"cache {name!r} does not say how many atoms per vector; {_ALLOWED}; e.g. lexico:15")
    key, _, value = numbers.partition("/")
    return {"key": int(key), "value": int(value)} if value else int(key)
