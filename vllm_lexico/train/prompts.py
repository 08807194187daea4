"""Prompts that make a model write what it will serve: answers of a chat, code, mathematics, long documents, languages.

A prompt is made of tables below, so that a few kilobytes give thousands of different ones. Prompts of all kinds but
the bare one are asked as a user of a chat would where the model has a chat template; else they are the start of a text
that is then continued.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RECIPE = 1  # of these tables and of how texts are made of them: a run goes on from texts of the same alone
DOCUMENT_TOKENS = 2000
ANSWER_TOKENS = 700
# Kind -> its share of the tokens written (docs/log.md).
SHARES = {"bare": 0.3, "chat": 0.15, "code": 0.2, "mathematics": 0.15, "documents": 0.1, "languages": 0.1}

SUBJECTS = (
    "the history of the printing press", "how vaccines work", "volcanoes", "the French Revolution", "black holes",
    "the music of Johann Sebastian Bach", "growing tomatoes on a balcony", "the Amazon rainforest", "inflation",
    "learning to swim as an adult", "the Roman road network", "photosynthesis", "a city council election", "chess",
    "the life of bees", "earthquakes", "the invention of the telephone", "renewable energy", "Japanese gardens",
    "the Silk Road", "how a refrigerator works", "marathon running", "the Great Depression", "coral reefs", "glaciers",
    "the history of tea", "modern architecture", "the moons of Jupiter", "antibiotics", "medieval guilds", "whales",
    "the rules of cricket", "how bridges are built", "the Ottoman Empire", "impressionist painting", "sleep",
    "a trial about a broken contract", "the migration of birds", "electric cars", "the periodic table", "deserts",
    "a family that runs a small hotel", "a detective in a coastal town", "two brothers and a lost letter", "storms",
    "an astronaut who comes home", "the first day at a new school", "a long train journey", "the rise of cinema",
    "wine making in the south of France", "the human heart", "computer viruses", "the Antarctic", "urban planning",
    "a small war between two kingdoms", "railways in India", "machine learning", "the stock exchange", "football",
)  # fmt: skip
REQUESTS = (
    "Explain {} to a beginner.", "Tell me about {}.", "What are common mistakes about {}?",
    "Give me ten facts about {}, with a sentence on each.", "Write an e-mail to a colleague about {}.",
    "Compare two views on {} and say which is better founded.", "Make a plan of five steps to learn about {}.",
    "Write a dialogue of two friends about {}.", "Summarise what is known about {} in a table.",
    "I have to give a talk about {}. What should I say?", "What questions would an expert ask about {}?",
)  # fmt: skip
DOCUMENTS = (
    "Write a long encyclopedia article about {}, with sections, dates, names and numbers.",
    "Write a chapter of a novel about {}. It should be long and full of detail.",
    "Write a long newspaper report about {}, with quotations.",
    "Write a detailed chapter of a textbook about {}, with examples and exercises.",
    "Write a long essay on {} in the style of the nineteenth century.",
)
PROGRAMS = (
    "a parser of CSV files", "an LRU cache", "a binary search tree", "a command line tool that renames files",
    "a REST API for a library of books", "a scheduler of tasks with priorities", "matrix multiplication",
    "a tokenizer for a small language", "a connection pool for a database", "Dijkstra's algorithm", "a rate limiter",
    "a text adventure", "unit tests for a bank account", "a form with validation", "a thread-safe queue",
    "a web scraper with retries", "an event bus", "Conway's game of life", "a Markdown converter", "a hash table",
    "a report of sales by month", "reading a configuration with defaults", "an image filter", "a date library",
)  # fmt: skip
CODE_LANGUAGES = (
    "Python", "Python", "Python", "JavaScript", "TypeScript", "Java", "C", "C++", "Go", "Rust", "SQL", "Bash",
    "HTML and CSS",
)  # fmt: skip
CODE_REQUESTS = (
    "Write {program} in {language}, as a complete module with docstrings or comments.",
    "Implement {program} in {language} and show how it is used.",
    "Review this design and then write it in {language}: {program}.",
    "Write tests in {language} for {program}, and the code that passes them.",
)
# How files of code start, for models that continue text.
CODE_STARTS = (
    '"""Implements {program}."""\n\nimport ', "// {program}\n#include <", "# {program}\n\nclass ",
    "/*\n * {program}\n */\n",
    "package main\n\n// {program}\nimport (", "-- {program}\nCREATE TABLE ", "def main():\n    # {program}\n",
)  # fmt: skip
PROBLEMS = (
    "A shop sells {a} boxes of {b} pens at {c} dollars a box. How much does each pen cost, and what do {d} pens cost?",
    "Solve {a}x + {b} = {c} step by step, then {a}x^2 - {d}x - {b} = 0.",
    "Prove by induction a formula for the sum of the first n terms of {a}, {b}, {c}, and say what the series tends to.",
    "A train leaves at {a} km/h and another one hour later at {b} km/h. When do they meet if they are {c} km apart?",
    "Compute the derivative and the integral of x^{a} e^({b}x), and check both.",
    "State and prove a theorem about groups of order {a}. Use LaTeX.",
    "In a class of {c} pupils {a} play chess and {b} play football. What is the least number that plays both? Explain.",
    "Find the eigenvalues of the matrix [[{a}, {b}], [{b}, {d}]] and diagonalise it.",
    "What is the probability that {a} dice show at least {b} sixes? Derive it step by step.",
)
# "Write a long text about: SUBJECT", and how a text starts.
LANGUAGES = (
    ("Schreibe einen langen Text über: {}.", "Die Geschichte beginnt"),
    ("Écris un long texte sur : {}.", "Il y a longtemps,"),
    ("Escribe un texto largo sobre: {}.", "Hace muchos años,"),
    ("Scrivi un lungo testo su: {}.", "Nel corso dei secoli"),
    ("Escreva um texto longo sobre: {}.", "Há muitos anos,"),
    ("请写一篇关于以下主题的长文:{}。", "在过去的几十年里,"),
    ("次のテーマについて長い文章を書いてください:{}。", "昔々、"),
    ("Напиши длинный текст на тему: {}.", "В начале века"),
    ("اكتب نصا طويلا عن: {}.", "في العصور القديمة"),
    ("इस विषय पर एक लंबा लेख लिखिए: {}।", "बहुत समय पहले"),
    ("다음 주제에 대해 긴 글을 써 주세요: {}.", "오래전에"),
    ("Napisz długi tekst na temat: {}.", "Przed wielu laty"),
)


@dataclass(frozen=True)
class Prompt:
    """What one text starts from.

    Args:
        kind: one of SHARES.
        ids: its tokens; the text has them too.
        most_tokens: that are written after it.
        to_the_end: the text is written to that length, whatever the model thinks its end.
    """

    kind: str
    ids: tuple[int, ...]
    most_tokens: int
    to_the_end: bool = False


def _chat(draw: random.Random) -> tuple[str, str]:
    subject = draw.choice(SUBJECTS)
    asked = draw.choice(REQUESTS).format(subject)
    return asked, f"Question: {asked}\nAnswer:"


def _document(draw: random.Random) -> tuple[str, str]:
    subject = draw.choice(SUBJECTS)
    return draw.choice(DOCUMENTS).format(subject), f"{subject[0].upper()}{subject[1:]}\n\n"


def _code(draw: random.Random) -> tuple[str, str]:
    program, language = draw.choice(PROGRAMS), draw.choice(CODE_LANGUAGES)
    asked = draw.choice(CODE_REQUESTS).format(program=program, language=language)
    return asked, draw.choice(CODE_STARTS).format(program=program)


def _mathematics(draw: random.Random) -> tuple[str, str]:
    numbers = {name: draw.randint(2, 60) for name in "abcd"}
    asked = draw.choice(PROBLEMS).format(**numbers)
    return asked, f"Problem: {asked}\nSolution:"


def _language(draw: random.Random) -> tuple[str, str]:
    asked, start = draw.choice(LANGUAGES)
    return asked.format(draw.choice(SUBJECTS)), start


# Kind -> (what is asked in a chat, how a text starts).
ASKED: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "chat": _chat,
    "code": _code,
    "mathematics": _mathematics,
    "documents": _document,
    "languages": _language,
}


class Prompts:
    """Prompts of all kinds, the same for the same seed.

    Args:
        tokenizer: of transformers, or None: then all are bare.
        words: token ids that a bare text may start with.
        start: the token that starts every text, if there is one.
        longest: tokens that a text may have, with its prompt.
        seed: of everything random.
        to_the_end: all texts are as long as they may be, whatever the model thinks their end.
    """

    def __init__(
        self,
        tokenizer: Any,
        words: list[int],
        start: int | None,
        longest: int,
        seed: int,
        *,
        to_the_end: bool = False,
    ) -> None:
        self.tokenizer, self.words, self.start, self.longest = tokenizer, words, start, longest
        self.to_the_end = to_the_end
        self.draw = random.Random(f"{RECIPE}/{seed}")
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self.kinds = tuple(SHARES) if tokenizer is not None else ("bare",)

    def take(self, kind: str) -> Prompt:
        """The next one of a kind."""
        start = () if self.start is None else (self.start,)
        if kind == "bare":
            ids = (*start, self.draw.choice(self.words))
            return Prompt(kind, ids, min(1024, self.longest) - len(ids), to_the_end=True)
        asked, beginning = ASKED[kind](self.draw)
        ids = self._ask(asked) if self.chats else (*start, *self._plain(beginning))
        ids = ids[: self.longest // 2] or (self.draw.choice(self.words),)
        most = DOCUMENT_TOKENS if kind == "documents" else ANSWER_TOKENS
        return Prompt(kind, ids, min(most, self.longest - len(ids)), self.to_the_end)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ask(self, words: str) -> tuple[int, ...]:
        """Through the chat template."""
        turns = [{"role": "user", "content": words}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._plain(text)
