"""Sleep of both levels on a GPU: codebooks, which no checkpoint has, come back, and answers are as before.

vLLM gives the memory away while an engine sleeps. Level 1 keeps the weights' memory in the host's, level 2 the model's
buffers alone; pages are lost in both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

SCRIPT = """
import json, sys

import torch
import vllm
from ways import PROMPTS, Asked

MEMORY = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.02, "skip_tokenizer_init": True}


def fill_what_is_free():
    "Whatever sleep gave away has other contents when it comes back; other tests' engines have the rest."
    free, _ = torch.cuda.mem_get_info()
    torch.full((int(free * 0.8),), 0xA5, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def main(model, other, dictionary, eager):
    llm = vllm.LLM(
        model, attention_backend="LEXICO", additional_config={"lexico": {"dictionary": dictionary}}, seed=0,
        max_model_len=2048, max_num_batched_tokens=256, enable_sleep_mode=True, enforce_eager=eager, dtype="bfloat16",
        worker_extension_cls="ways.WaysFaults", **MEMORY,
    )
    asked, found = Asked(llm, {}), {}
    ask = lambda: (llm.reset_prefix_cache(), asked.ask(PROMPTS))[1]
    found["before"], addresses = ask(), llm.collective_rpc("codebook_addresses")
    llm.sleep(level=1)
    fill_what_is_free()
    llm.wake_up()
    found["level 1"] = ask()
    for name, weights in (("level 2", {}), ("new weights", {"weights_path": other}), ("old", {"weights_path": model})):
        llm.sleep(level=2)
        fill_what_is_free()
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs=weights)
        llm.wake_up(tags=["kv_cache"])
        found[name] = ask()
    found["moved"] = llm.collective_rpc("codebook_addresses") != addresses
    llm.collective_rpc("lose_codebooks")
    found["lost"] = ask()
    return found


if __name__ == "__main__":
    model, other, dictionary, eager, out = sys.argv[1:]
    found = main(model, other, dictionary, eager == "eager")
    with open(out, "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="module", params=["eager", "graphs"])
def found(request, strong_llama, other_llama, strong_dictionary, tmp_path_factory):
    """Rows before and after each sleep, of an engine without and with CUDA graphs and torch.compile."""
    folder = tmp_path_factory.mktemp("sleep")
    (folder / "sleep.py").write_text(SCRIPT)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    given = str(strong_llama), other_llama, str(strong_dictionary), request.param, str(folder / "found")
    command = [sys.executable, str(folder / "sleep.py"), *given]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return json.loads((folder / "found").read_text())


def tokens(rows):
    return [row["tokens"] for row in rows]


@pytest.mark.gpu
def test_answers_after_sleep_are_as_before(found):
    for name in ("level 1", "level 2", "old"):
        assert tokens(found[name]) == tokens(found["before"]), name


@pytest.mark.gpu
def test_new_weights_and_lost_codebooks_are_seen(found):
    assert tokens(found["new weights"]) != tokens(found["before"]) != tokens(found["lost"])
    assert not found["moved"]  # CUDA graphs know where codebooks are
