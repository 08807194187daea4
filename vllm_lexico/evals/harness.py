"""lm-evaluation-harness's model around one vLLM engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm_lexico import compat


class HarnessModel:
    """The harness's vLLM model. It keeps the token ids of answers, which the harness itself drops.

    Args:
        model: a checkpoint's folder or hub id.
        arguments: of vLLM's engine, as they are.

    Attributes:
        lm: the harness's model.
        llm: the vLLM engine that the harness started.
        answers: token ids of each answer, by the token ids of its prompt.

    Raises:
        ValueError: the harness is not installed.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        answers: dict[tuple[int, ...], list[int]] = {}

        class Recorded(_harness_class()):  # type: ignore[misc]
            def _model_generate(self, requests: list[list[int]], *args: Any, **kwargs: Any) -> list[Any]:
                outputs = super()._model_generate(requests, *args, **kwargs)
                for request, output in zip(requests, outputs, strict=True):
                    answers[tuple(request)] = list(output.outputs[0].token_ids)
                return outputs

        self.lm = Recorded(pretrained=model, **arguments)
        self.llm = self.lm.model
        self.answers = answers


def _harness_class() -> Any:
    """The harness's vLLM model; ValueError where the harness is not installed."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        with compat.cpu_build_known_as_vllm():
            from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise ValueError(
            f"GSM8K is run by lm-evaluation-harness, which is not there ({error}); run `pip install lm_eval`, or leave "
            f"gsm8k out of --tasks"
        ) from error
    return VLLM
