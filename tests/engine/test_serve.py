"""`vllm serve` with LEXICO: spawned processes know the name, and answers that codes hold come over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from faults import FAULTS, WRITTEN

START_SECONDS = 480  # two cores, beside another engine
LETTERS = 1300  # of the text, in whose first line the answer stands: so many that it has left the window
# Without it the model nearly ties between two languages, and bfloat16's rounding decides.
SYSTEM = "Answer truthfully in one short sentence."


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """Port and log file of a running API server, whose engine and worker are spawned processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    # What `vllm serve` runs; the command itself asks for the version of a distribution that the CPU wheel is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm2", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--attention-backend", "LEXICO"]
    command += ["--additional-config", '{"lexico": {"sparsity": {"key": 15, "value": 11}}}']
    command += ["--worker-extension-cls", "faults.Faults"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
        yield port, log
    finally:
        process.terminate()
        process.wait(60)


def chat(port, question):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 24}
    return json.loads(ask(port, "/v1/chat/completions", body))["choices"][0]["message"]["content"]


def about_the_lighthouse(port, root):
    """An answer that stands far back in a text, where only codes have it; asked again, those in the prefix cache."""
    text = (root / "examples" / "lighthouse.txt").read_text(encoding="utf-8")[:LETTERS]
    return chat(port, f"{text}\nWho built the lighthouse on Gull Island?")


def test_a_chat_is_answered(server):
    port, _ = server
    assert "Paris" in chat(port, "What is the capital of France?")


def test_a_question_about_a_text_is_answered_from_codes(server, root):
    port, _ = server
    for _ in range(2):  # cold, and from the prefix cache
        assert "Margaret Holloway" in about_the_lighthouse(port, root)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(server, root, fault):
    port, _ = server
    if fault in WRITTEN:
        ask(port, "/reset_prefix_cache", {})
    ask(port, "/collective_rpc", {"method": "plant_fault", "args": [fault]})
    try:
        assert "Margaret Holloway" not in about_the_lighthouse(port, root)
    finally:
        ask(port, "/collective_rpc", {"method": "plant_fault", "args": [None]})


def test_the_start_line_says_what_the_cache_costs(server):
    _, log = server
    (line,) = [line for line in log.read_text().splitlines() if "LEXICO: " in line]
    # 30 layers, 3 heads: 16 + 12 entries and scales of 2 bytes, against 2 x 64 numbers of 2 bytes
    said = "packed16", "sparsity 15/11", "SmolLM2-135M-Instruct", "5,040 bytes per token", "23,040", "tokens fit"
    for words in said:
        assert words in line


def test_metrics_tell_what_is_served(server):
    port, _ = server
    said = ask(port, "/metrics").splitlines()
    (info,) = [line for line in said if line.startswith("lexico:cache_info{")]
    assert 'key_sparsity="15"' in info and 'value_sparsity="11"' in info and "SmolLM2-135M-Instruct" in info
    assert 'lexico:bytes_per_token{model_name="smollm2"} 5040.0' in said
    assert 'lexico:uncoded_bytes_per_token{model_name="smollm2"} 23040.0' in said
