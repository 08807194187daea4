"""Are bytes worth more where a text will be asked for? Answers from caches of equal bytes, dealt out in several ways.

    python benchmarks/uneven.py Qwen/Qwen2.5-Coder-1.5B-Instruct --data DATA --dictionary FILE --seconds 330

A text is computed exactly, then coded in every way (`bench/uneven_cases.py`), then asked several questions; no engine.
Which tokens get many atoms and which few is decided by

  oracle       KVzip's score (arXiv 2505.23416): the largest attention that a token draws, per KV head, when the model
               repeats the text; the question is not seen
  mlp, linear  gates that predict the rank of that score from keys and values, as coding could; trained here on texts of
               training alone (`bench/gates.py`)
  lost         the energy that 7 atoms lose of it, which coding can know without a gate
  damage       the oracle's attention times the root of that
  heads        how often the oracle chooses a head's tokens in texts of training; layers likewise
  .. in shares the same within a head's block, of which each head has that share
  random       nothing: what uneven records cost by themselves

Beside these: even codes with atoms moved between keys and values and between layers, and with other stretches of keys
(`bench/restretched.py`).

Tasks and scores are the evaluation's (`vllm_lexico/evals/tasks/`), with other texts and several questions for each. The
first 16 and the newest --window tokens stay as they are. Texts of all tasks take turns: --seconds cuts all alike.

Answers go to ANSWERS (--answers), one line each as they come. Rows go to benchmarks/results/uneven.jsonl: metric
`found`, peer exact, with the answers lost and won against exact, the bytes of a vector, and for gates the share of the
oracle's tokens that they choose.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.asked_model import AskedModel, History
from bench.gates import GATES, Gate, recall
from bench.record import RESULTS, record
from bench.restretched import RestretchedCodec, stretches
from bench.uneven_cases import Case, cases, choose, in_shares, lost_scores, mean_bytes, read_back
from bench.uneven_texts import AnyTexts, Text, make_texts, repetitions, training_texts
from bench.vector_codecs import DictionaryCodec
from lexico_kernels.memory.layout import KV
from torch import Tensor
from transformers import AutoTokenizer

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.train.asked import asked_most

ERRORS_OF = 7  # atoms
TASKS = ["qa_20", "qa_60", "pairs_75", "needle_8192"]
STOPS = ("\n\n", "\nQuestion:")  # of models without a chat template, which go on by themselves


class Study:
    """Answers every question of a text from every way to read it.

    Args:
        args: of the command.
        dictionary: of the model.
    """

    def __init__(self, args: argparse.Namespace, dictionary: Dictionary) -> None:
        self.args, self.dictionary = args, dictionary
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AskedModel(args.model, args.device)
        shape = dictionary.info.fingerprint
        dictionary.check(shape.of(self.model.model.config.get_text_config()), args.model)
        self.cases = [case for case in cases(shape.num_layers) if not args.cases or case.name in args.cases]
        self.layers = shape.num_layers
        self.gates: dict[str, Gate] = {}
        self.stretches: dict[str, Tensor] = {}
        self.shares: Tensor | None = None  # [layers, Hk], of tokens that the oracle chooses in texts of training
        self.coders = cache(partial(self._coder))
        self.stretch = {kv: dictionary.tensors[f"{kv}_stretch"].to(self.model.device) for kv in KV}
        config = self.model.model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else []
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    def _coder(self, sparsity: int, stretch: str) -> DictionaryCodec:
        if stretch:
            return RestretchedCodec(self.dictionary, self.model.device, sparsity, self.stretches[stretch])
        return DictionaryCodec(self.dictionary, self.model.device, sparsity, sparsity)

    def _spent(self, on: str) -> None:
        """Add the time since the last call to what was spent on something."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[on] += now - self._began
        self._began = now

    def train(self, frame: Any) -> None:
        """Train the gates and make the stretches that cases ask for, of texts of training.

        frame: of a task, for its way to ask.
        """
        gates = [name for name in GATES if any(case.by.split()[0] == name for case in self.cases)]
        named = {case.stretch for case in self.cases} - {""}
        energy = torch.zeros_like(self.stretch["key"])
        if (
            gates
            or named
            or any("heads" in case.by or "shares" in case.by or "layers" in case.by for case in self.cases)
        ):
            texts = training_texts(frame, self.args.data, self.args.gate_tokens, self.args.gate_texts)
            histories = [self.model.compute(ids) for ids in texts]
            scores = [self._drawn(frame, *both, energy) for both in zip(texts, histories, strict=True)]
            self.gates = {name: GATES[name](histories, scores, self.args.gate_steps) for name in gates}
            coded = [max(len(ids) - self.args.window, self.model.sinks + 1) for ids in texts]
            of_texts = [asked_most(own[..., self.model.sinks : stop]) for own, stop in zip(scores, coded, strict=True)]
            self.shares = torch.stack(of_texts).mean(0)
            self.stretches = stretches(self.stretch["key"], energy, named)
        self._spent("gates")

    def _drawn(self, frame: Any, ids: list[int], history: History, energy: Tensor | None = None) -> Tensor:
        return self.model.drawn(history, list(repetitions(frame, ids, self.args.chunk)), energy)

    def ask(self, frame: Any, text: Text) -> list[dict[str, Any]]:
        """A line per case and question. frame: of the text's task."""
        self._spent("else")
        exact = self.model.compute(text.ids)
        coded = range(self.model.sinks, max(self.model.sinks, len(text.ids) - self.args.window))
        self._spent("computing")
        scores = self._scores(frame, text, exact, coded)
        chosen = {case.name: choose(scores[case.by], coded, case) for case in self.cases if case.high}
        self._spent("scores")
        read = [read_back(at, both, self.cases, chosen, coded, self.coders) for at, both in enumerate(exact)]
        self._spent("coding")
        said = self.model.answer(read, text.prompts, text.most, self.ends)
        self._spent("answers")
        facts = [self._facts(case, chosen, scores["oracle"], coded) for case in self.cases]
        lines = []
        for at, ids in enumerate(said):
            of_case, of_question = divmod(at, len(text.prompts))
            answer, value = self._words(frame, ids), text.values[of_question]
            about = {"task": text.task, "text": text.index, "question": of_question, "tokens": len(text.ids)}
            about |= {"case": self.cases[of_case].name, "found": int(text.found(value, answer))}
            lines.append(about | facts[of_case] | {"value": value, "answer": answer})
        return lines

    def _scores(self, frame: Any, text: Text, exact: History, coded: range) -> dict[str, Tensor]:
        """All that may rank tokens, float32 [layers, Hk, L] by name."""
        scores = {"oracle": self._drawn(frame, text.ids, exact)}
        scores |= {name: gate(exact) for name, gate in self.gates.items()}
        random = torch.Generator().manual_seed(text.index)
        scores["random"] = torch.rand(scores["oracle"].shape, generator=random).to(self.model.device)
        if self.shares is not None:
            by_layer = self.shares.mean(1, keepdim=True)
            scores["heads"], scores["layers"] = (
                share.expand(self.shares.shape)[..., None].expand(scores["oracle"].shape)
                for share in (self.shares, by_layer)
            )
            ranked = ("oracle", "random", *self.gates)
            scores |= {f"{name} in shares": in_shares(scores[name], self.shares) for name in ranked}
        if any(case.by in ("lost", "damage") for case in self.cases):
            scores["lost"] = lost_scores(exact, coded, self.coders(ERRORS_OF, ""), self.stretch)
            scores["damage"] = scores["oracle"] + scores["lost"] / 2
        return scores

    def _facts(self, case: Case, chosen: dict[str, Tensor], oracle: Tensor, coded: range) -> dict[str, Any]:
        """Bytes of a vector, and for what is not the oracle's choice the share of that that is chosen."""
        mask = chosen.get(case.name)
        facts = {"vector_bytes": mean_bytes(case, self.layers, mask, coded)} if case.codes else {}
        if mask is not None and not case.by.startswith("oracle"):
            facts["recall"] = recall(mask, choose(oracle, coded, case))
        return facts

    def _words(self, frame: Any, ids: list[int]) -> str:
        words = self.tokenizer.decode(ids, skip_special_tokens=True)
        return words if frame.is_chat else min((words.split(stop)[0] for stop in STOPS), key=len)


def sign_test(lost: int, won: int) -> float:
    """Two-sided probability of so uneven a split, or a more uneven one, of a fair coin."""
    count, few = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(few + 1)) / 2**count)


def write_rows(lines: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Print and record the share found of each task and case. about: fields of every row's case."""
    groups: dict[tuple[str, str], dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        groups[line["task"], line["case"]][line["text"], line["question"]] = line
    for (task, case), members in groups.items():
        exact = groups[task, "exact"]
        lost = sum(exact[at]["found"] > line["found"] for at, line in members.items())
        won = sum(exact[at]["found"] < line["found"] for at, line in members.items())
        found, peer = (sum(line["found"] for line in each.values()) / len(each) for each in (members, exact))
        facts = {"questions": len(members), "lost": lost, "won": won, "sign_test": round(sign_test(lost, won), 4)}
        for name in ("vector_bytes", "recall"):
            values = [line[name] for line in members.values() if name in line]
            facts |= {name: round(sum(values) / len(values), 4)} if values else {}
        record("uneven", about | {"task": task, "way": case} | facts, "found", found, "exact", peer, folder=folder)
        print(
            f"{task:12} {case:22} found {found:.3f} ({found / peer if peer else math.nan:.2f})  {lost:3} : {won:<3} "
            f"p {facts['sign_test']:.3f}  bytes {facts.get('vector_bytes', math.nan):6.2f}  "
            f"recall {facts.get('recall', math.nan):.3f}",
            flush=True,
        )


def run(args: argparse.Namespace) -> None:
    """Ask texts of all tasks in turn until all are asked or time is up, then write rows."""
    until = time.perf_counter() + args.seconds
    study = Study(args, load_dictionary(args.dictionary))
    tasks = make_texts(args.tasks, study.tokenizer, args.data, args.questions)
    study.train(tasks[0].frame)
    args.answers.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    try:
        ask_all(study, tasks, until, lines)
    finally:  # what was answered before an error or a signal is measured too
        about = {"model": Path(args.model).name, "dictionary": args.dictionary.name, "window": args.window}
        write_rows(lines, about | {"chunk": args.chunk, "gate_texts": args.gate_texts}, args.results)


def ask_all(study: Study, tasks: Sequence[AnyTexts], until: float, lines: list[dict[str, Any]]) -> None:
    """Ask a text of each task in turn, until all are asked or the next turn would end too late; extends `lines`."""
    args, longest = study.args, 0.0
    with args.answers.open("w", encoding="utf-8") as file:
        for index in range(args.texts):
            began = time.perf_counter()
            if began + longest > until:
                print(f"time is up after {index} of {args.texts} texts per task", flush=True)
                break
            for task in tasks:
                of_text = study.ask(task.frame, task.text(index))
                file.writelines(json.dumps(line) + "\n" for line in of_text)
                lines += of_text
            file.flush()
            took = time.perf_counter() - began
            longest = max(longest, took) if index > 1 else took  # the first compiles kernels
            spent = ", ".join(f"{on} {seconds:.1f}" for on, seconds in study.seconds.items())
            print(f"text {index} of each task: {took:.1f} s; so far {spent}", flush=True)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="checkpoint: a folder, or a hub id")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the tasks' data and of texts of training")
    add("--dictionary", type=Path, required=True, metavar="FILE", help="of the model")
    add("--tasks", nargs="+", default=TASKS, metavar="TASK", help="with their size (default: %(default)s)")
    add("--texts", type=int, default=20, help="per task (default: %(default)s)")
    add("--questions", type=int, default=5, help="per text (default: %(default)s)")
    add("--cases", nargs="*", default=[], metavar="NAME", help="of bench/uneven_cases.py; exact must be one (all)")
    add("--window", type=int, default=96, help="newest tokens read as they are (default: %(default)s)")
    add("--chunk", type=int, default=2048, help="tokens that are repeated at a time (default: %(default)s)")
    add("--gate-texts", type=int, default=15, help="that gates learn from (default: %(default)s)")
    add("--gate-tokens", type=int, default=4096, help="of each of these (default: %(default)s)")
    add("--gate-steps", type=int, default=800, help="that a gate's network learns in (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="no further texts after so long (default: no limit)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--answers", type=Path, default=Path("uneven_answers.jsonl"), metavar="FILE", help="(default: %(default)s)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="of rows (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(parse_args())
