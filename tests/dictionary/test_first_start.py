"""`"dictionary": "train"`: trained once however many start together, found by the next start, and failing in words."""

import logging
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_lexico.dictionary import first_start, search
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.first_start import find_or_train
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.names import file_name
from vllm_lexico.processes import without_ranks
from vllm_lexico.serve.setup import LexicoSetup, _checked_dictionary

FINGERPRINT = ModelFingerprint("llama", 1, 2, 16, 64, "{}")

# Stands for the training: notes that it ran, takes a while, and leaves a copy of a dictionary made before.
TRAINER = """
import shutil, sys, time
made, out, notes = sys.argv[1:]
open(notes, "a").write("trained ")
time.sleep(0.5)
shutil.copy(made, out)
"""


@pytest.fixture(autouse=True)
def addresses(tmp_path, monkeypatch):
    """Nothing is bundled, the user's cache is empty, the hub is off; what was found before is forgotten."""
    monkeypatch.setattr(search, "bundled_folder", lambda: tmp_path / "bundled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "_answers", lambda repo, file: False)
    _checked_dictionary.cache_clear()
    return tmp_path


def test_a_cache_that_cannot_be_written_is_named(addresses, monkeypatch):
    (addresses / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(addresses / "file"))
    with pytest.raises(ValueError, match=r"the dictionary of some/model cannot be kept in .*file.* set XDG_CACHE_HOME"):
        find_or_train("some/model", FINGERPRINT)


def test_no_rank_is_told_that_it_is_one(monkeypatch):
    for name in ("VLLM_DP_SIZE", "VLLM_DP_RANK", "VLLM_DP_MASTER_IP", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    left = without_ranks()
    assert left["VLLM_LOGGING_LEVEL"] == "ERROR" and "PATH" in left
    assert not [name for name in left if name.startswith("VLLM_DP_") or name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]


@pytest.fixture
def trainer(addresses, monkeypatch):
    """The command replaced; notes.txt has a word for each training."""
    tensors = {}
    for kv in ("key", "value"):
        tensors[f"{kv}_atoms"] = torch.ones(1, 4, 8, dtype=torch.uint8)
        tensors[f"{kv}_atoms"][:, 0] = 0
        tensors[f"{kv}_mean"] = torch.zeros(1, 2, 16)
        tensors[f"{kv}_stretch"] = torch.ones(1, 2, 16)
        tensors[f"{kv}_levels"] = torch.zeros(1, 32, 16)
    info = DictionaryInfo("some/model", FINGERPRINT, 4, 4, 2, "a test", 1, 1)
    Dictionary(info, tensors).save(addresses / "made.safetensors")
    notes = addresses / "notes.txt"
    notes.touch()

    def command(model_name, out, overrides, max_model_len):
        return [sys.executable, "-c", TRAINER, str(addresses / "made.safetensors"), str(out), str(notes)]

    monkeypatch.setattr(first_start, "_command", command)
    return notes


def test_trained_once_and_found_by_the_next_start(trainer, addresses, caplog):
    found = []
    with caplog.at_level(logging.INFO, logger="vllm.lexico"):
        ranks = [
            threading.Thread(target=lambda: found.append(find_or_train("some/model", FINGERPRINT))) for _ in range(4)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    out = addresses / "cache" / "vllm-lexico" / "some_model.safetensors"
    assert found == [out] * 4 and trainer.read_text() == "trained "
    words = caplog.text
    assert words.count("there is no dictionary for some/model, so one is trained now") == 1
    assert words.count("waiting for another process") == 3 and " s: " in words.split("trained the dictionary of")[1]
    assert find_or_train("some/model", FINGERPRINT) == out and trainer.read_text() == "trained "


def test_failure_stops_the_start_and_says_what_to_run(trainer, monkeypatch):
    monkeypatch.setattr(first_start, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(ValueError, match=r"some/model failed with status 2.*by hand: vllm-lexico train some/model$"):
        find_or_train("some/model", FINGERPRINT)
    monkeypatch.setattr(first_start, "_command", lambda *_: [sys.executable, "-c", ""])
    with pytest.raises(ValueError, match="failed with status 0"):  # a command that leaves no file
        find_or_train("some/model", FINGERPRINT)


# Stands for a training that takes long: notes that it runs, and what has ended it.
LONG = """
import signal, sys
from pathlib import Path
note = Path(sys.argv[1])
def end(*_):
    note.write_text("terminated")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
note.write_text("training")
sys.stdin.read()
note.write_text("alone")
"""


def wait_for(note, words: str) -> None:
    for _ in range(600):
        if note.exists() and note.read_text() == words:
            return
        time.sleep(0.1)
    pytest.fail(f"{note} never said {words}")


@pytest.mark.parametrize("gone", [True, False])
def test_training_is_ended_with_who_wants_it(addresses, monkeypatch, caplog, gone):
    """vLLM's engine takes no notice of SIGTERM while it starts, but its parent is gone; or a signal raises in it."""
    note = addresses / "note"

    def wanted():
        if note.exists() and note.read_text() == "training":
            if not gone:
                raise SystemExit
            monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))
        check()

    check = first_start._check_wanted
    monkeypatch.setattr(first_start, "_check_wanted", wanted)
    with pytest.raises(ValueError if gone else SystemExit, match="vLLM was ended while" if gone else None):
        first_start._run([sys.executable, "-c", LONG, str(note)])
    assert note.read_text() == "terminated" and "finished rounds are kept" in caplog.text


def test_training_sees_its_parent_end_however_it_does(addresses):
    note = addresses / "note"
    program = "import sys; from vllm_lexico.dictionary import first_start; first_start._run(sys.argv[1:])"
    command = [sys.executable, "-P", "-c", program, sys.executable, "-c", LONG, str(note)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as parent:
        wait_for(note, "training")
        parent.kill()
    wait_for(note, "alone")


def test_another_models_file_is_not_replaced(trainer, addresses):
    out = addresses / "cache" / "vllm-lexico" / "some_model.safetensors"
    out.parent.mkdir(parents=True)
    out.write_text("something else")
    with pytest.raises(
        ValueError, match=r"no dictionary for some/model.*some_model\.safetensors is there and of no use"
    ):
        find_or_train("some/model", FINGERPRINT)
    assert out.read_text() == "something else" and not trainer.read_text()


def setup_of(model, config, hf_overrides=None) -> LexicoSetup:
    vllm_config = SimpleNamespace(
        additional_config={"lexico": {"dictionary": "train"}},
        model_config=SimpleNamespace(
            hf_text_config=config, model=model, hf_overrides=hf_overrides, max_model_len=4096, is_hybrid=False
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
        num_speculative_tokens=0,
        max_concurrent_batches=1,
    )
    return LexicoSetup.of(vllm_config)


def config_of(**rope):
    shape = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SimpleNamespace(**shape, hidden_size=64, head_dim=16, **rope)


def test_what_was_trained_is_checked_like_any_other(trainer):
    config = config_of()
    with pytest.raises(ValueError, match="the dictionary of some/model does not fit some/model: rope"):
        setup_of("some/model", config)


def test_the_real_training_of_a_local_model(addresses, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = addresses / "tiny model"
    LlamaForCausalLM(config).save_pretrained(model)
    small = ["--atoms", "16", "--vectors", "64", "--sequence-tokens", "64", "--passes", "1", "--rounds", "1"]
    small += ["--device", "cpu", "--writer", "transformers"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so small that threads only wait for each other
    command = first_start._command
    monkeypatch.setattr(first_start, "_command", lambda *given: command(*given) + small)
    setup = setup_of(str(model), config)
    [trained] = (addresses / "cache" / "vllm-lexico").glob("tiny_model@*.safetensors")
    assert setup.dictionary_path == trained
    assert load_dictionary(setup.dictionary_path).info.atoms == 16
    monkeypatch.setattr(first_start, "_command", None)  # not needed again
    _checked_dictionary.cache_clear()
    assert setup_of(str(model), config).dictionary_path == setup.dictionary_path


def test_what_the_engine_overrides_is_trained_for(addresses, monkeypatch):
    """The file has a name of its own, beside that of the model as it is."""
    commands = []
    monkeypatch.setattr(first_start, "_run", lambda command: commands.append(command) or 2)
    yarn = replace(FINGERPRINT, rope='{"rope_type": "yarn"}')
    overrides = '{"rope_parameters": {"rope_type": "yarn"}}'
    with pytest.raises(
        ValueError, match=re.escape(f"by hand: vllm-lexico train some/model --hf-overrides '{overrides}'")
    ):
        find_or_train("some/model", yarn, overrides)
    (command,) = commands
    assert command[command.index("--hf-overrides") + 1] == overrides
    out = Path(command[command.index("--out") + 1])
    assert out.name.startswith("some_model+") and out.name == file_name("some/model", yarn.rope)


def test_what_short_sequences_need_is_trained_for(addresses, monkeypatch):
    """vLLM chooses between two sets of rotary factors by the longest sequence."""
    commands = []
    monkeypatch.setattr(first_start, "_run", lambda command: commands.append(command) or 2)
    short = replace(FINGERPRINT, rope='{"factors": "short", "original_max_position_embeddings": 4096.0}')
    with pytest.raises(ValueError, match=r"by hand: vllm-lexico train some/model --max-model-len 4096$"):
        find_or_train("some/model", short)
    (command,) = commands
    assert command[command.index("--max-model-len") + 1] == "4096" and "--hf-overrides" not in command
    assert Path(command[command.index("--out") + 1]).name == file_name("some/model", short.rope)


def test_overrides_by_a_function_are_not_trained_for(trainer):
    with pytest.raises(ValueError, match="train some/model --hf-overrides JSON, where JSON says what your function"):
        setup_of("some/model", config_of(rope_theta=5.0), hf_overrides=lambda config: config)
    assert not trainer.read_text()
