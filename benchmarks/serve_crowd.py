"""A crowd of requests over HTTP against `vllm serve`, with the answers kept beside a peer's.

    python benchmarks/serve_crowd.py MODEL --name SmolLM2-135M-Instruct --out DIR

Starts a server for each backend, sends it all requests at once and keeps the answers as JSON and as a page to read.
Writes `requests_finished` to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.health import becomes_healthy
from bench.record import record
from bench.terminated import end_orderly
from bench.texts import TEXT

from vllm_lexico.processes import stop

QUESTION = "\n\nSay in two sentences what the text above is about."
SHORT = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a list.",
]
START_SECONDS = 400
CHARACTERS_A_TOKEN = 4.0  # of this text, to aim at a length; the server's own count is kept with each answer


def make_prompts(count: int, shortest: int, longest: int) -> list[str]:
    """A few short questions and passages with a question, of lengths from short to long, in random order."""
    prompts = list(SHORT)
    for i in range(count - len(SHORT)):
        tokens = shortest + (longest - shortest) * i // max(count - len(SHORT) - 1, 1)
        length = int((tokens - 30) * CHARACTERS_A_TOKEN)
        start = random.Random(i).randrange(len(TEXT) - length)
        prompts.append(TEXT[start : start + length] + QUESTION)
    random.Random(0).shuffle(prompts)
    return prompts


async def ask_all(port: int, prompts: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Send all prompts at once; each answer with the server's count of its prompt's tokens."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)

    async def ask(prompt: str) -> dict[str, Any]:
        messages: Any = [{"role": "user", "content": prompt}]
        try:
            answer = await client.chat.completions.create(
                model="model", messages=messages, temperature=0, max_tokens=max_tokens
            )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        choice = answer.choices[0]
        assert answer.usage is not None
        return {
            "prompt_tokens": answer.usage.prompt_tokens,
            "answer": choice.message.content,
            "end": choice.finish_reason,
        }

    return await asyncio.gather(*map(ask, prompts))


def serve(model: str, backend: str, port: int, extra: list[str], log: Path) -> subprocess.Popen:
    """Start `vllm serve` and wait until it is healthy."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--attention-backend", backend]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", *extra]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if not becomes_healthy(process, port, START_SECONDS):
            sys.exit(f"serve_crowd: the server with {backend} did not start:\n{log.read_text()[-4000:]}")
        return process
    except BaseException:
        stop(process)
        raise


def page(name: str, prompts: list[str], answers: dict[str, list[dict[str, Any]]], shown: int) -> str:
    """Some prompts with every backend's answer, from short to long."""
    first = next(iter(answers.values()))
    order = sorted(range(len(prompts)), key=lambda i: first[i].get("prompt_tokens", 0))
    chosen = [order[i * (len(order) - 1) // (shown - 1)] for i in range(shown)]
    lines = [f"### {name}", ""]
    for i in chosen:
        ending = " ".join(prompts[i].split())[-90:]
        lines += [f"- **{first[i].get('prompt_tokens')} prompt tokens** (… {ending})"]
        for backend, given in answers.items():
            words = " ".join((given[i].get("answer") or given[i].get("error", "")).split())
            lines += [f"  - {backend}: {words[:400]}"]
    return "\n".join(lines) + "\n"


def keep(folder: Path, name: str, prompts: list[str], answers: dict[str, list[dict[str, Any]]]) -> None:
    """Write all answers, and the page of some."""
    (folder / f"{name}.json").write_text(json.dumps({"prompts": prompts, "answers": answers}))
    (folder / f"{name}.md").write_text(page(name, prompts, answers, shown=8))


def main() -> None:
    """Serve, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="what the results call the model")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers and logs")
    parser.add_argument("--backends", nargs="+", default=["LEXICO", "FLASH_ATTN"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs=2, default=[50, 6000], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--serve-arguments", default="--max-model-len 8192", help="more arguments of `vllm serve`")
    args = parser.parse_args()
    end_orderly()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = make_prompts(args.requests, *args.lengths)
    answers = {}
    for backend in args.backends:
        log = args.out / f"{args.name}-{backend}.log"
        server = serve(args.model, backend, args.port, args.serve_arguments.split(), log)
        try:
            asyncio.run(ask_all(args.port, SHORT, 8))  # compile what compiles at first use
            started = time.perf_counter()
            answers[backend] = asyncio.run(ask_all(args.port, prompts, args.max_tokens))
            seconds = time.perf_counter() - started
        finally:
            stop(server)
        finished = sum("answer" in answer for answer in answers[backend])
        lengths = [answer.get("prompt_tokens", 0) for answer in answers[backend]]
        case = {"model": args.name, "backend": backend, "requests": len(prompts), "seconds": round(seconds, 2)}
        case |= {"prompt_tokens": [min(lengths), max(lengths)]}
        record("engine", case, "requests_finished", finished)
        keep(args.out, args.name, prompts, answers)  # after each, so that nothing is lost if the next does not start
        print(f"{args.name} {backend}: {finished} of {len(prompts)} finished in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
