"""A folder of results as a run leaves it, without an engine."""

import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_lexico.evals.caches import parse_cache
from vllm_lexico.evals.folder import settle
from vllm_lexico.evals.identity import identities
from vllm_lexico.evals.prediction_files import write_result
from vllm_lexico.evals.settings import EvalSettings, NeedleSettings

PLAIN_BYTES = 1000
PASSAGES = [
    {
        "context": f"The tower of town{i} is {i} metres high. It was built by mason{i}.",
        "qas": [
            {"question": f"How high is the tower of town{i}?", "answers": [f"{i} metres"]},
            {"question": f"Who built the tower of town{i}?", "answers": [f"mason{i}"]},
        ],
    }
    for i in range(12)
]
# Numbers 11 to 510 are of the test split.
PROGRAMS = [
    {
        "task_id": i,
        "text": f"Write a function to add {i}.",
        "code": f"def add{i}(x):\r\n    return x + {i}",
        "test_list": [f"assert add{i}(1) == {i + 1}", f"assert add{i}(0) == {i}"],
        "test_setup_code": "",
    }
    for i in range(1, 21)
]
HELD = {"sequences": 2, "tokens": 500.0, "bytes": 1e5, "bytes_per_token": 300.0}


class WordTokenizer:
    """A token for each word or sign; remembers them, so that ids can be read back."""

    bos_token_id = 0

    def __init__(self, template=True, bos=False):
        self.chat_template, self.bos, self.known = template or None, bos, ["<s>"]

    def __call__(self, text, add_special_tokens=True, **_):
        ids = []
        for word in re.findall(r"\w+|\n|[^\w\s]", text):
            if word not in self.known:
                self.known.append(word)
            ids.append(self.known.index(word))
        return {"input_ids": [0, *ids] if self.bos and add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
        assert not enable_thinking
        return f"USER {messages[0]['content']} ASSISTANT"

    def read(self, ids):
        return " ".join(self.known[i] for i in ids)


@pytest.fixture
def word_tokenizer() -> type[WordTokenizer]:
    return WordTokenizer


@pytest.fixture
def data(tmp_path) -> Path:
    """The files that tasks read, a few lines each."""
    folder = tmp_path / "data"
    folder.mkdir()
    words = [
        "alpha",
        "bravo",
        "delta",
        "gamma",
        "kappa",
        "lambda",
        "omega",
        "sigma",
        "theta",
        "zebra",
        "yield",
        "whale",
    ]
    sentences = [" ".join(random.Random(i).choices(words, k=12)) + "." for i in range(60)]
    text = "\n\n".join(sentences)
    problems = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
    lines = "\n".join(map(json.dumps, problems))
    books = "\n".join(json.dumps({"text": "\n\n".join(sentences[i::3])}) for i in range(3))
    files = {"gsm8k_test.jsonl": lines, "gsm8k_train.jsonl": lines, "wikitext2_raw_test.txt": text}
    files |= {
        "xquad_en.jsonl": "\n".join(map(json.dumps, PASSAGES)),
        "mbpp.jsonl": "\n".join(map(json.dumps, PROGRAMS)),
    }
    for name, content in {**files, "train_textbooks.jsonl": books}.items():
        (folder / f"{name}.xz").write_bytes(lzma.compress(content.encode()))
    return folder


@pytest.fixture
def settings(data) -> EvalSettings:
    return EvalSettings("org/model", str(data), {"max_model_len": 512}, needle=NeedleSettings((300,), 2, 2))


def predictions(task: str, quality: float) -> list[dict]:
    """Rows of 20 samples, of which the share `quality` is right."""
    right = [int(i < 20 * quality) for i in range(20)]
    if task == "gsm8k":
        return [
            {"id": i, "strict": ok, "flexible": ok, "tokens": [1, 2, 3 if ok else 4, 5]} for i, ok in enumerate(right)
        ]
    if task == "wikitext":
        return [{"id": i, "loss": 2 + i / 20 + 0.1 * (1 - quality)} for i in range(20)]
    names = ("single", "multi")
    about = [{"length": 300 if i % 2 else 600, "kind": names[i // 10], "document": f"{i // 2}"} for i in range(20)]
    return [{"id": str(i), "found": ok} | more for i, (ok, more) in enumerate(zip(right, about, strict=True))]


def about_result(identity: dict, token_bytes: float) -> dict:
    """What a worker says of one task."""
    held = {"all": HELD, "300": HELD | {"bytes_per_token": 500.0}}
    numbers = {"token_bytes": token_bytes, "plain_token_bytes": PLAIN_BYTES, "capacity_tokens": 10**6}
    return {"identity": identity, "held": held, "seconds": 12.0, "start_seconds": 30.0} | numbers


@pytest.fixture
def about() -> Callable[[dict, float], dict]:
    return about_result


@pytest.fixture
def make_results(tmp_path, settings) -> Callable[..., Path]:
    """Write results of (cache, quality, bytes a token) at all tasks, and the configuration."""

    def make(*caches: tuple[str, float, float], tasks=("gsm8k", "wikitext", "needle")) -> Path:
        out = tmp_path / "out"
        asked = {name: identities(settings, parse_cache(name), tasks) for name, _, _ in caches}
        settle(out, asked)
        for name, quality, token_bytes in caches:
            for task, identity in asked[name].items():
                folder = out / parse_cache(name).folder
                write_result(folder, task, about_result(identity, token_bytes), predictions(task, quality))
        return out

    return make
