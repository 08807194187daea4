"""Prompts for text that a model writes itself: of every kind, by its share, the same for the same seed."""

from collections import Counter

import pytest

from vllm_lexico.train.own_text import join, split
from vllm_lexico.train.prompts import ANSWER_TOKENS, DOCUMENT_TOKENS, SHARES, Prompts
from vllm_lexico.train.vllm_writer import next_wave


class Tokenizer:
    """A token a letter, which is its code point; with a chat template unless it is told otherwise."""

    def __init__(self, chats=True):
        self.chat_template = "a template" if chats else None

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def prompts_of(tokenizer, longest=4096, seed=0, start=None) -> Prompts:
    return Prompts(tokenizer, [7, 8, 9], start, longest, seed)


def test_each_kind_through_the_chat_template():
    prompts = prompts_of(Tokenizer())
    for kind in set(SHARES) - {"bare"}:
        words = ["".join(map(chr, prompts.take(kind).ids)) for _ in range(20)]
        assert all(word.startswith("<user>") and word.endswith("<assistant>") for word in words)
        assert len(set(words)) > 5 and not any("{" in word and "}" in word for word in words)
    documents = prompts.take("documents")
    assert documents.most_tokens == DOCUMENT_TOKENS and prompts.take("chat").most_tokens == ANSWER_TOKENS
    assert not documents.to_the_end


def test_models_without_a_template_go_on_from_how_a_text_starts():
    prompts = prompts_of(Tokenizer(chats=False), start=5)
    for kind in set(SHARES) - {"bare"}:
        prompt = prompts.take(kind)
        assert prompt.ids[0] == 5 and 60 not in prompt.ids[:1] and len(prompt.ids) > 1
    assert "Question: " in "".join(map(chr, prompts.take("chat").ids))


def test_bare_texts_start_from_any_token_and_need_no_tokenizer():
    prompts = prompts_of(None, start=5)
    assert prompts.kinds == ("bare",)
    taken = [prompts.take("bare") for _ in range(30)]
    assert {prompt.ids for prompt in taken} == {(5, 7), (5, 8), (5, 9)}
    assert all(prompt.to_the_end and prompt.most_tokens == 1022 for prompt in taken)
    assert prompts_of(None).take("bare").ids in {(7,), (8,), (9,)}


def test_a_seed_decides_them():
    once, twice, other = ([prompts_of(Tokenizer(), seed=s).take("chat") for _ in range(3)] for s in (1, 1, 2))
    assert once == twice and once != other


def test_no_text_is_longer_than_the_engine_takes():
    prompts = prompts_of(Tokenizer(), longest=64)
    for kind in SHARES:
        prompt = prompts.take(kind)
        assert prompt.most_tokens > 0 and len(prompt.ids) + prompt.most_tokens <= 64


def test_texts_that_are_written_to_the_end_fill_one_wave():
    prompts = Prompts(Tokenizer(), [7], None, 256, 0, to_the_end=True)
    wave = next_wave(prompts, Counter(), Counter(), 10_000)
    assert all(prompt.to_the_end and len(prompt.ids) + prompt.most_tokens == 256 for prompt in wave)
    assert 10_000 <= 256 * len(wave) < 1.1 * 10_000 and {prompt.kind for prompt in wave} == set(SHARES)


def test_a_wave_fills_what_lacks():
    assert sum(SHARES.values()) == pytest.approx(1)
    prompts, written, counts = prompts_of(Tokenizer()), Counter(), Counter()
    lengths = {"chat": 300, "code": 450, "mathematics": 300, "documents": 800, "languages": 300}  # shorter than guessed
    waves = []
    while written.total() < 400_000:
        waves.append(next_wave(prompts, written, counts, 400_000))
        for prompt in waves[-1]:
            written[prompt.kind] += lengths.get(prompt.kind, prompt.most_tokens)
            counts[prompt.kind] += 1
    assert {kind: written[kind] / written.total() for kind in SHARES} == pytest.approx(SHARES, abs=0.05)
    assert len(waves) == 2 and written.total() < 1.1 * 400_000
    assert next(prompt.kind for prompt in waves[0]) == "documents" and waves[0][-1].most_tokens == ANSWER_TOKENS
    assert "documents" not in {prompt.kind for prompt in waves[1]}
    assert next_wave(prompts, written, counts, written.total()) == []


def test_a_wave_without_a_tokenizer_is_bare():
    wave = next_wave(prompts_of(None), Counter(), Counter(), 5000)
    assert [prompt.kind for prompt in wave] == ["bare"] * 6


def test_texts_are_joined_into_rows():
    import torch

    rows = join(torch.arange(10, dtype=torch.int32), 4)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and rows.dtype == torch.int64
    assert [split(length) for length in (64, 1024, 1025, 2048)] == [1, 1, 2, 2]
