"""Training on the CPU: rounds of a tiny random model from text to file, interrupted and not, and the command line."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import lexico_kernels.files
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_runs import same, settings_for, train

import vllm_lexico.files
from vllm_lexico import cli
from vllm_lexico.cli import train as cli_train
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train import asked, rounds, run, settings, state
from vllm_lexico.train.run import checked_devices, train_dictionary
from vllm_lexico.train.settings import Plan, share_layers

FINGERPRINT = ModelFingerprint("llama", 2, 2, 16, 64, "{}")


def test_rounds_grow_with_memory(monkeypatch):
    given = settings_for(vectors=3072)  # 48 positions of a sequence, two heads, 256 bytes per token: 393216 in all
    assert Plan.of(given, FINGERPRINT, 1 << 20, "cpu") == Plan(3, 11, 3, 32768)
    assert Plan.of(given, FINGERPRINT, 2048, "cpu").furthest == 2048
    monkeypatch.setattr(settings, "ROUND_BYTES", {"cpu": 40_000, "cuda": 1 << 40})
    assert Plan.of(given, FINGERPRINT, 2048, "cpu") == Plan(10, 4, 1, 2048)
    assert Plan.of(given, FINGERPRINT, 2048, "cuda").rounds == 3


@pytest.mark.parametrize(
    ("layers", "devices", "together", "expected"),
    [
        (range(5), 1, 1, [[0, 1, 2, 3, 4]]),
        (range(5), 2, 1, [[0, 1], [2, 3, 4]]),
        (range(5), 3, 1, [[0], [1, 2], [3, 4]]),
        (range(2), 3, 1, [[0], [1]]),
        ((5, 11, 17), 2, 1, [[5], [11, 17]]),
        (range(6), 2, 2, [[0, 1], [2, 3, 4, 5]]),  # [[0, 1, 2], ...] would learn layers 2 and 3 apart
        (range(5), 4, 2, [[0, 1], [2, 3], [4]]),
        (range(3), 2, 8, [[0, 1, 2]]),
    ],
)
def test_devices_share_layers(layers, devices, together, expected):
    names = [f"cuda:{at}" for at in range(devices)]
    shares = share_layers(layers, names, together)
    assert [own for _, own in shares] == expected
    assert [device for device, _ in shares] == names[: len(expected)]


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="--device is abacus; allowed: cpu, cuda, cuda:1"):
        checked_devices("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_devices(None) == checked_devices("cpu") == ["cpu"]
    with pytest.raises(ValueError, match="--device is cuda:1; allowed: cpu, as PyTorch sees no GPU"):
        checked_devices("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checked_devices(None) == checked_devices("cuda") == ["cuda:0", "cuda:1"]
    assert checked_devices("cuda:1") == ["cuda:1"] and checked_devices("cpu") == ["cpu"]


@pytest.mark.parametrize("own_text", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_file(tiny_model, tmp_path, learned, texts, own_text):
    given, out = settings_for(() if own_text else texts), tmp_path / "d.safetensors"
    whole = train(tiny_model, given, tmp_path / "whole.safetensors")
    assert learned == [(0, 0, False), (0, 1, False), (0, 2, True)]
    learned.clear()
    learned.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, given, out)
    with pytest.raises(ValueError, match=r"another run \(seed 0 there and 1 here\); delete it, or repeat that run"):
        train(tiny_model, settings_for(given.data, seed=1), out)
    learned.stop_at = None
    resumed = train(tiny_model, given, out)
    assert learned == [(0, 0, False), (0, 1, False), (0, 2, True)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["d.safetensors", "whole.safetensors"]
    assert same(resumed, whole)

    info = whole.info
    assert info.model_name == "me/tiny" and info.fingerprint.head_dim == 64
    assert info.data == ("text sampled from the model itself" if own_text else "a.jsonl.xz, b.txt")
    sequences = 3 * (3 if own_text else 4)  # of 48 or 32 kept positions, for 768 vectors of two heads
    assert info.tokens_seen == sequences * 64 and info.vectors_seen == sequences * (48 if own_text else 32) * 2
    assert set(info.errors["key"]) == set(info.errors["value"]) == {"7", "15"}
    assert all(0 < lost < 1 for tables in info.errors.values() for row in tables.values() for lost in row)
    torch.testing.assert_close(whole.usage("value").sum(1), torch.ones(2), atol=1e-3, rtol=0)  # kept in half precision


def test_a_seed_decides_the_file(tiny_model, tmp_path, texts):
    once, twice, other = (
        train(tiny_model, settings_for(texts, rounds=1, seed=seed), tmp_path / f"{at}.safetensors")
        for at, seed in enumerate((7, 7, 8))
    )
    assert same(once, twice) and not torch.equal(once.tensors["key_atoms"], other.tensors["key_atoms"])


@pytest.mark.parametrize(
    ("rounds", "stretches"),
    [(1, [(0, 1)]), (2, [None, (0, 1)]), (3, [None, None, (0, 1)]), (4, [None, None, (0, 0.5), (0.5, 1)])],
)
def test_the_last_half_anneals(rounds, stretches):
    plan = Plan(rounds, sequences=1, held_out_sequences=1, furthest=0)
    assert [plan.cooling(number) for number in range(rounds)] == stretches


def test_rounds_that_gain_nothing_end_in_the_annealed_ones(tiny_model, tmp_path, learned, texts, monkeypatch):
    monkeypatch.setattr(rounds, "LEAST_GAIN", 2.0)
    made = train(tiny_model, settings_for(texts, rounds=7), tmp_path / "d.safetensors")
    assert learned == [(0, 0, False), (0, 1, False), (0, 4, True), (0, 5, True), (0, 6, True)]
    assert made.info.tokens_seen == 5 * 2 * 64  # what was read, not what was planned
    assert made.tensors["key_levels"][:, 1:].any(-1).all()


def test_two_devices_make_the_same_file_as_one(tiny_model, tmp_path, learned, texts, monkeypatch):
    def spawn(function, args, nprocs, daemon):
        for rank in range(nprocs):
            function(rank, *pickle.loads(pickle.dumps(args)))

    one = train(tiny_model, settings_for(texts), tmp_path / "one.safetensors")
    learned.clear()
    monkeypatch.setattr(run, "checked_devices", lambda device: ["cpu", "cpu"])
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    learned.stop_at = 4  # in the second share, whose first round is done
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, settings_for(texts), tmp_path / "two.safetensors")
    learned.stop_at = None
    two = train(tiny_model, settings_for(texts), tmp_path / "two.safetensors")
    assert [(layer, number) for layer, number, _ in learned] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert same(one, two)


def test_two_processes(tiny_model, tmp_path, texts, monkeypatch, short_texts):
    """Real ones: what they are given travels, they leave their layers, and what goes wrong in one is a sentence."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `one_thread` here
    monkeypatch.setitem(asked.TEXTS, "cpu", short_texts)
    monkeypatch.setattr(run, "checked_devices", lambda device: ["cpu", "cpu"])
    given = settings_for(texts, rounds=1)
    made = train(tiny_model, given, tmp_path / "two.safetensors")
    assert made.tensors["key_atoms"].shape[0] == 2 and len(made.info.errors["key"]["7"]) == 2
    monkeypatch.setattr(run, "checked_devices", lambda device: ["cpu"])
    assert same(made, train(tiny_model, given, tmp_path / "one.safetensors"))


def test_what_is_overridden_is_trained_for(tiny_model, tmp_path, texts, monkeypatch):
    """Keys turn otherwise, the first layer's values are the same, and the file has a name of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    paths = [
        train_dictionary(str(tiny_model), settings_for(texts, rounds=1, **more), name="me/tiny", device="cpu")
        for more in (
            {},
            {"hf_overrides": json.dumps({"rope_parameters": yarn})},
            {"hf_overrides": '{"bos_token_id": 0}'},
        )
    ]
    assert paths[0].name == paths[2].name == "me_tiny.safetensors" and paths[1].name.startswith("me_tiny+")
    own, other = map(load_dictionary, paths[:2])
    assert json.loads(other.info.fingerprint.rope) == yarn and own.info.fingerprint.rope != other.info.fingerprint.rope
    assert torch.equal(own.tensors["value_atoms"][0], other.tensors["value_atoms"][0])
    assert not torch.equal(own.tensors["key_atoms"][0], other.tensors["key_atoms"][0])


def test_command_line(tiny_model, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    small = ["--atoms", "16", "--atom-bits", "4", "--vectors", "512", "--sequence-tokens", "64"]
    small += ["--writer", "transformers", "--verbose"]
    arguments = ["train", str(tiny_model), *small, "--passes", "1", "--rounds", "2", "--out", str(out)]
    assert cli.main([*arguments, "--name", "me/tiny", "--device", "cpu"]) == 0
    words = capsys.readouterr().out
    assert f"wrote {out}" in words and f"picture: {tmp_path / 'd.png'}" in words
    assert "round 2/2  layer   1  energy lost  key s=7 0." in words and "round 1/2  mean " in words
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(out), "--no-plot"]) == 0
    words = capsys.readouterr().out
    for expected in ("dictionary of me/tiny", "llama, 2 layers, 2 KV heads of 64", "sampled from the model", " mean "):
        assert expected in words


def test_weights_and_text_are_part_of_a_run(tiny_model, tmp_path, learned):
    """What was replaced since a run was interrupted stops it; what did not change does not."""
    model, text, out = tmp_path / "model", tmp_path / "a.txt", tmp_path / "d.safetensors"
    shutil.copytree(tiny_model, model)
    text.write_text("abc" * 300)
    given = settings_for((str(text),))
    learned.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        train(model, given, out)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"holds rounds of another run \(another weights\); delete it, or repeat"):
        train(model, given, out)
    shutil.copy(tiny_model / "model.safetensors", weights)
    text.write_text("abd" * 300)
    with pytest.raises(ValueError, match=r"holds rounds of another run \(another text\)"):
        train(model, settings_for((str(text),)), out)
    text.write_text("abc" * 300)
    learned.stop_at = None
    train(model, settings_for((str(text),)), out)
    assert [number for _, number, _ in learned] == [0, 1, 2]


def fill_disk(monkeypatch, write: int, place: str) -> None:
    """The disk is full at a write, counted from 1: half way, when it is synced, or when it takes its name."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def half(tensors, name, metadata=None):
        save_file(tensors, name, metadata)
        with Path(name).open("r+b") as file:
            file.truncate(100)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    started, save_file, whole_file = [], vllm_lexico.files.save_file, vllm_lexico.files.whole_file
    faults = {
        "half way": (vllm_lexico.files, "save_file", half),
        "synced": (lexico_kernels.files, "_sync", full),
        "named": (lexico_kernels.files.Path, "replace", full),
    }

    def counted(*arguments):
        started.append(arguments)
        if len(started) == write:
            monkeypatch.setattr(*faults[place])
        return whole_file(*arguments)

    monkeypatch.setattr(vllm_lexico.files, "whole_file", counted)


def test_a_full_disk_at_any_write_ends_in_the_same_file(tiny_model, tmp_path, texts, learned, monkeypatch):
    """Four files are written: a round, what is asked, the finished layers, the dictionary. Each fails in each way."""
    given, out = settings_for(texts, rounds=2), tmp_path / "d.safetensors"
    whole = train(tiny_model, given, tmp_path / "whole.safetensors")
    learned.clear()
    left = []
    for file in ("layers_000_rounds", "asked", "layers_000_finished", "dictionary"):
        for place in ("half way", "synced", "named"):
            write = 2 if place == "half way" and file != "layers_000_rounds" else 1  # the one before it is made up for
            with monkeypatch.context() as patch:
                fill_disk(patch, write, place)
                with pytest.raises(OSError, match="No space left on device"):
                    train(tiny_model, given, out)
            assert sorted(path.stem for path in tmp_path.glob("*/*.state")) == left
            assert not out.exists() and not list(tmp_path.rglob("*.tmp"))
        left = sorted([*left, file])
    assert [number for _, number, _ in learned] == [0] * 4 + [1] * 7
    assert same(train(tiny_model, given, out), whole)


@pytest.mark.parametrize(
    ("weight", "number", "dtype", "words"),
    [
        ("layers.1.self_attn.k_proj", float("nan"), "auto", "layer 1 .* its keys are NaN or infinite in float32"),
        ("layers.0.mlp.up_proj", float("inf"), "auto", "layer 1 .* its keys are NaN or infinite in float32"),
        ("layers.0.self_attn.v_proj", 1e9, "float16", "layer 0 .* its values are NaN or infinite in float16"),
        ("layers.1.self_attn.q_proj", float("nan"), "auto", "layer 1 .* its queries are NaN or infinite in float32"),
    ],
)
def test_a_layer_that_cannot_be_learned_is_named_at_once(
    tiny_model, tmp_path, texts, learned, weight, number, dtype, words
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{weight}.weight"][3] = number
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{words}.*; allowed are finite numbers; try --dtype bfloat16 or float32"):
        train(model, settings_for(texts, dtype=dtype), tmp_path / "d.safetensors")
    assert not learned and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_trainings_of_one_file_are_refused(tiny_model, tmp_path, texts, learned, monkeypatch):
    out = tmp_path / "d.safetensors"
    learned.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, settings_for(texts), out)
    learned.stop_at = None
    monkeypatch.setattr(state, "LOCK_SECONDS", 0.0)
    folder = tmp_path / "d.safetensors.partial"
    with (
        FileLock(folder / state.LOCK),
        pytest.raises(ValueError, match=r"another process trains into .*d\.safetensors"),
    ):
        train(tiny_model, settings_for(texts), out)
    assert len(learned) == 1
    train(tiny_model, settings_for(texts), out)
    assert out.is_file() and not folder.exists()


def test_a_commit_of_another_project_is_not_ours(tmp_path, monkeypatch):
    project = tmp_path / "project"
    package = project / "site-packages" / "vllm_lexico" / "train"
    package.mkdir(parents=True)
    (package / "run.py").write_text("")
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    assert run._version() == run._release()
    subprocess.run([*git, "add", "-f", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert run._version() == f"{run._release()} ({commit})"


def test_a_picture_of_something_else_is_not_overwritten(tmp_path):
    out = tmp_path / "mine.safetensors"
    assert cli_train.other_picture(None) is None and cli_train.other_picture(out) is None
    (tmp_path / "mine.png").write_bytes(b"a photograph")
    assert cli_train.other_picture(out) == tmp_path / "mine.losses.png"
    out.write_bytes(b"")  # a dictionary that is trained anew has its picture there
    assert cli_train.other_picture(out) is None
