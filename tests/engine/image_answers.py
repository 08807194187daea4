"""What engines answer about images, in a process that finds a stand-in for torchvision: `in_a_process_with_images`."""

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import image_families
from engines import make_tokens, start
from faults import FAULTS
from written import written

BACKENDS = ("CPU_ATTN", "LEXICO")
SETTINGS = {"max_model_len": 1024, "max_num_batched_tokens": 256, "skip_tokenizer_init": False}
IMAGE_TOKENS = 12, 10  # of its rows and columns
BEFORE, AFTER = 200, 300  # tokens of text; one block of 128 ends before an image
TEXT = 400
VECTORS_OF = 160  # tokens of text that are compared with what training captures
FIRST_FAULT = next(iter(FAULTS))


def in_a_process_with_images(function: Callable, *args: Any) -> Any:
    """What a function of this folder returns in a process that imports everything anew."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare) as process:
        return process.submit(function, *args).result()


def _prepare() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if importlib.util.find_spec("torchvision") is None:
        sys.path.insert(0, str(Path(__file__).parent / "no_torchvision"))
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()  # which would import everything once more


def answer_about_images(folders: dict[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """What both backends answer, by the family's name and the backend's.

    Args:
        folders: of checkpoints, by the family's name.

    Returns:
        tokens, logprobs, hits: of an answer about an image, again about it in a longer text, about another image, and
            to text alone; with Gemma 3 of text alone.
        faulty: log-probabilities of the first with a fault planted; of LEXICO alone.
        written: K and V of VECTORS_OF tokens of text; of LEXICO alone.
        refused: the sentence with which LEXICO does not start; "" where it does.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, folder in folders.items():
        found[name] = {backend: _answers(name, folder, backend) for backend in BACKENDS}
        found[name]["LEXICO"]["refused"] = ""
        if not _takes_images(name):
            (Path(folder) / "model.safetensors").unlink()  # the refusal comes before weights are looked for
            try:
                start(folder, "LEXICO", {"codec": "exact"}, SETTINGS)
            except ValueError as error:
                found[name]["LEXICO"]["refused"] = str(error)
    return found


def _takes_images(name: str) -> bool:
    return name != "Gemma 3"  # whose prompts are seen in both directions where they are images


def _answers(name: str, folder: str, backend: str) -> dict[str, Any]:
    import vllm

    images = 1 if _takes_images(name) else 0
    limits = {"image": images} | ({"video": 0} if images else {})
    llm = start(folder, backend, {"codec": "exact"}, SETTINGS | {"limit_mm_per_prompt": limits})
    asked = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0)

    def answers(prompts: list[dict[str, Any]]) -> list[Any]:
        return [llm.generate([prompt], asked, use_tqdm=False)[0] for prompt in prompts]

    prompts = _prompts(name)
    outputs = answers(prompts)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [_logprobs(output) for output in outputs],
        "hits": [output.num_cached_tokens for output in outputs],
    }
    if backend == "LEXICO":
        with written() as vectors:
            text = {"prompt_token_ids": letters(33, VECTORS_OF)}
            llm.generate([text], vllm.SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        found["written"] = vectors
        llm.reset_prefix_cache()
        llm.collective_rpc("plant_fault", args=(FIRST_FAULT,))
        found["faulty"] = [_logprobs(output) for output in answers(prompts[:1])]
        llm.collective_rpc("plant_fault", args=(None,))
    return found


def _logprobs(output: Any) -> list[float]:
    said = output.outputs[0]
    return [one[token].logprob for token, one in zip(said.token_ids, said.logprobs, strict=True)]


def _prompts(name: str) -> list[dict[str, Any]]:
    text = {"prompt_token_ids": letters(32, TEXT)}
    if not _takes_images(name):
        return [text]
    family = image_families.FAMILIES[name]
    ids = family.ids
    place = [ids["vision_start_token_id"], ids["image_token_id"], ids["vision_end_token_id"]]
    prompt = letters(30, BEFORE) + place + letters(31, AFTER)
    one, other = (_image(2 * family.patch, seed) for seed in (0, 1))
    longer = prompt + letters(34, 50)
    asked = ((prompt, one), (longer, one), (prompt, other))
    about = [{"prompt_token_ids": tokens, "multi_modal_data": {"image": [image]}} for tokens, image in asked]
    return [*about, text]


def letters(seed: int, count: int) -> list[int]:
    """Tokens without a meaning of their own."""
    return [min(token, 95) for token in make_tokens(seed, count)]


def _image(side: int, seed: int) -> Any:
    """A picture of noise; side: of a token's square, in pixels."""
    import numpy
    from PIL import Image

    rows, columns = IMAGE_TOKENS
    pixels = numpy.random.default_rng(seed).integers(0, 255, (rows * side, columns * side, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)
