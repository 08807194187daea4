"""A dictionary that is there, with how often each head is asked measured and added; nothing is learned."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.names import same_model
from vllm_lexico.dictionary.tensors import ASKED_SHARES
from vllm_lexico.train.asked import Asking, measure_shares, words_for_shares
from vllm_lexico.train.capture import load_model
from vllm_lexico.train.in_turn import comes_in_turn, refuse_writing
from vllm_lexico.train.memory import words_for_memory
from vllm_lexico.train.own_text import WRITTEN_TOKENS, read_tokenizer, sequences_from_model
from vllm_lexico.train.progress import Progress
from vllm_lexico.train.rounds import texts_of
from vllm_lexico.train.settings import FURTHEST_TOKENS, TrainSettings


def add_shares(model: str, settings: TrainSettings, name: str, longest: int, out: Path, device: str) -> Path:
    """Write the dictionary of `settings.continue_from` with the shares of heads; its other tensors stay as they are.

    Where there is no data, transformers has the model write the text.

    Args:
        model: hub id or folder.
        settings: of a training of no rounds.
        name: of the model, for dictionaries.
        longest: tokens that the model reads.
        out: the file.
        device: "cuda:1" and so on, or "cpu".

    Returns:
        `out`.

    Raises:
        ValueError: the dictionary is another model's, text cannot be read, the model is too short to repeat a text, or
            memory too small.
        OSError: the file cannot be written.
    """
    given = load_dictionary(settings.continue_from)
    if not same_model(given.info.model_name, name):
        raise ValueError(
            f"--continue-from is {settings.continue_from}, a dictionary of {given.info.model_name}, and --rounds 0 "
            f"would only measure {name}; allowed: a dictionary of that model; give its name with --name if it is "
            f"the same, or leave --rounds out to adapt the dictionary"
        )
    shape, kind = given.info.fingerprint, torch.device(device).type
    asking = Asking.of(read_tokenizer(model), kind, min(longest, FURTHEST_TOKENS))
    if not asking.tokens:
        raise ValueError(
            f"{model} reads {longest} tokens, too few to repeat a text; allowed are models that read more; serve with "
            f"the dictionary as it is"
        )
    with words_for_memory("loading the model", device):
        in_turn = comes_in_turn(model, settings.dtype, settings.hf_overrides, 0, device)
        if in_turn and not settings.data:
            refuse_writing(model, by_vllm=False)
        loaded = load_model(
            model, device, settings.dtype, settings.hf_overrides, settings.max_model_len, in_turn=in_turn
        )
    if settings.data:
        rows = texts_of(model, settings).take(asking.rows(settings.length), 0)
    else:
        length = min(asking.tokens, WRITTEN_TOKENS)
        rows = sequences_from_model(loaded, length, asking.rows(length), settings.seed, asking.rows(length))
    texts, began, progress = asking.cut(rows), time.monotonic(), Progress()
    with words_for_memory("reading", device):
        shares = measure_shares(loaded, texts, shape.layers, shape.num_kv_heads, asking)
    progress.say(words_for_shares(shares, shape.layers, texts, began))
    progress.close()
    text = ", ".join(Path(data).name if Path(data).exists() else data for data in settings.data)
    measured = {"texts": len(texts), "tokens": texts.shape[1], "of": text or "the model itself", "seed": settings.seed}
    info = replace(given.info, recipe=given.info.recipe | {"asked": measured})
    Dictionary(info, given.tensors | {ASKED_SHARES: shares}).save(out)
    return out
