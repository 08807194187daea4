"""Training on the CPU: what is captured, rounds of a tiny random model from text to file, and the command line."""

import json
import lzma
import pickle

import pytest
import torch

from vllm_lexico import cli
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train import run
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.run import Plan, TrainSettings, checked_devices, share_layers, train_dictionary

LEARN = LearnSettings(atoms=32, sparsity=4, batch=128)
FINGERPRINT = ModelFingerprint("llama", 2, 2, 16, 64, "{}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Shapes here are so small that threads only wait for each other, very long when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama of 2 layers with a tokenizer that knows single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(97 + at): at + 2 for at in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Names of two sources."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the quick brown fox jumps over the lazy dog and some more words to read "
    with lzma.open(folder / "a.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": words * count}) + "\n" for count in (1, 20))
    (folder / "b.txt").write_text("zzz" * 1000)
    return str(folder / "a.jsonl.xz"), str(folder / "b.txt")


@pytest.fixture
def learned(monkeypatch):
    """(first layer, round, annealed) of what is learned; the call numbered `learned.stop_at` is interrupted."""

    class Learned(list):
        stop_at = None

    seen, learn = Learned(), LayerLearners.learn

    def noted(self, store, passes, number, *, cooling, **more):
        if len(seen) == seen.stop_at:
            raise KeyboardInterrupt
        seen.append((self.layers[0], number, cooling is not None))
        learn(self, store, passes, number, cooling=cooling, **more)

    monkeypatch.setattr(LayerLearners, "learn", noted)
    monkeypatch.setattr(run, "LEAST_GAIN", -1e9)  # no round is the last before its time
    return seen


def settings_for(data: tuple[str, ...] = (), **changes) -> TrainSettings:
    usual = {"data": data, "learn": LEARN, "vectors": 768, "passes": 2, "rounds": 3, "sequence_tokens": 64}
    return TrainSettings(**(usual | changes))


def train(model, settings, out):
    return load_dictionary(train_dictionary(str(model), settings, name="me/tiny", out=out, device="cpu"))


def same(one, other) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys()
    return tensors and one.info == other.info and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


def test_capture_takes_what_the_cache_would_hold(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(5))
    store = capture(model, ids, 32, [1], (2, 16), seed=0, batch=1)
    cache = model(ids, use_cache=True).past_key_values.layers[1]
    for kv, vectors in enumerate((cache.keys, cache.values)):  # 48 - 16 = 32: every later position, in some order
        expected = vectors[:, :, 16:].transpose(1, 2).reshape(2, 32, -1)
        got = store[0, kv].view(2, 32, -1)
        torch.testing.assert_close(got.sum(1), expected.sum(1), atol=1e-4, rtol=1e-4)
        assert torch.cdist(got, expected).min(-1).values.max() < 1e-3


def test_capture_adds_up_the_queries_of_a_group(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (3, 48), generator=torch.Generator().manual_seed(7))
    got = torch.zeros(1, 2, 16)
    capture(model, ids, 1, [0], (2, 16), seed=0, batch=2, queries=got)
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    query = layer.self_attn.q_proj(hidden).unflatten(2, (2, 2, 16))  # rotary embedding turns pairs and keeps their sum
    energy = query[:, 16:].square().sum((0, 1, 3))
    torch.testing.assert_close(got[0].view(2, 2, 8).sum(1), energy.view(2, 2, 8).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_capture_far_into_a_context_turns_keys_alone(tiny_model, batch):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (6, 32), generator=torch.Generator().manual_seed(6))
    far = capture(model, ids, 16, [0, 1], (2, 16), seed=1, batch=batch, furthest=44)
    shifts = []
    for row in range(6):
        got = far.view(2, 2, 6, 16, -1)[:, :, row]
        distances = []
        for shift in range(44 - 32 + 1):
            addresses = torch.arange(32)[None] + shift
            layers = model(ids[row : row + 1], position_ids=addresses, use_cache=True).past_key_values.layers
            expected = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])
            expected = expected[:, :, :, 16:].transpose(2, 3).flatten(3)
            distances.append(torch.cdist(got, expected).min(-1).values.amax((0, 2)))
        keys, values = torch.stack(distances).T
        assert values.max() < 1e-3 and keys.min() < 1e-3 and (keys < 1e-3).sum() == 1
        shifts.append(int(keys.argmin()))
    assert shifts[:2] == shifts[4:] == [0, 0] and max(shifts[2:4]) > 0


def test_capture_needs_keys_and_values_of_every_layer(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.ones(1, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"layers \[7\] have no K and V of ordinary attention"):
        capture(model, ids, 16, [1, 7], (2, 16), seed=0, batch=1)
    with pytest.raises(ValueError, match=r"layer 0 has K .* allowed are models with the same KV heads"):
        capture(model, ids, 16, [0], (4, 16), seed=0, batch=1)


def test_rounds_grow_with_memory(monkeypatch):
    settings = settings_for(vectors=3072)  # 48 positions of a sequence, two heads, 256 bytes a token: 393216 in all
    assert Plan.of(settings, FINGERPRINT, 1 << 20, "cpu") == Plan(3, 11, 3, 32768)
    assert Plan.of(settings, FINGERPRINT, 2048, "cpu").furthest == 2048
    monkeypatch.setattr(run, "ROUND_BYTES", {"cpu": 40_000, "cuda": 1 << 40})
    assert Plan.of(settings, FINGERPRINT, 2048, "cpu") == Plan(10, 4, 1, 2048)
    assert Plan.of(settings, FINGERPRINT, 2048, "cuda").rounds == 3


@pytest.mark.parametrize(
    ("num_layers", "devices", "expected"),
    [(5, 1, [[0, 1, 2, 3, 4]]), (5, 2, [[0, 1], [2, 3, 4]]), (5, 3, [[0], [1, 2], [3, 4]]), (2, 3, [[0], [1]])],
)
def test_devices_share_layers(num_layers, devices, expected):
    names = [f"cuda:{at}" for at in range(devices)]
    shares = share_layers(num_layers, names)
    assert [layers for _, layers in shares] == expected
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
    settings, out = settings_for(() if own_text else texts), tmp_path / "d.safetensors"
    whole = train(tiny_model, settings, tmp_path / "whole.safetensors")
    assert learned == [(0, 0, False), (0, 1, False), (0, 2, True)]
    learned.clear()
    learned.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, settings, out)
    with pytest.raises(ValueError, match="other settings; delete it or repeat that run"):
        train(tiny_model, settings_for(settings.data, seed=1), out)
    learned.stop_at = None
    resumed = train(tiny_model, settings, out)
    assert learned == [(0, 0, False), (0, 1, False), (0, 2, True)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["d.safetensors", "whole.safetensors"]
    assert same(resumed, whole)

    info = whole.info
    assert info.model_name == "me/tiny" and info.fingerprint.head_dim == 16
    assert info.data == ("text sampled from the model itself" if own_text else "a.jsonl.xz, b.txt")
    sequences = 3 * (3 if own_text else 4)  # of 48 or 32 kept positions, for 768 vectors of two heads
    assert info.tokens_seen == sequences * 64 and info.vectors_seen == sequences * (48 if own_text else 32) * 2
    assert set(info.errors["key"]) == set(info.errors["value"]) == {"7", "15"}
    assert all(0 < lost < 1 for tables in info.errors.values() for row in tables.values() for lost in row)
    torch.testing.assert_close(whole.usage("value").sum(1), torch.ones(2), atol=1e-3, rtol=0)  # kept in half precision


def test_a_seed_decides_the_file(tiny_model, tmp_path, texts):
    once, twice, other = (
        train(tiny_model, settings_for(texts, seed=seed), tmp_path / f"{at}") for at, seed in enumerate((7, 7, 8))
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
    monkeypatch.setattr(run, "LEAST_GAIN", 2.0)
    made = train(tiny_model, settings_for(texts, rounds=7), tmp_path / "d")
    assert learned == [(0, 0, False), (0, 1, False), (0, 4, True), (0, 5, True), (0, 6, True)]
    assert made.info.tokens_seen == 5 * 2 * 64  # what was read, not what was planned
    assert made.tensors["key_levels"][:, 1:].any(-1).all()


def test_two_devices_make_the_same_file_as_one(tiny_model, tmp_path, learned, texts, monkeypatch):
    def spawn(function, args, nprocs):
        for rank in range(nprocs):
            function(rank, *pickle.loads(pickle.dumps(args)))

    one = train(tiny_model, settings_for(texts), tmp_path / "one")
    learned.clear()
    monkeypatch.setattr(run, "checked_devices", lambda device: ["cpu", "cpu"])
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    learned.stop_at = 4  # in the second share, whose first round is done
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, settings_for(texts), tmp_path / "two")
    learned.stop_at = None
    two = train(tiny_model, settings_for(texts), tmp_path / "two")
    assert [(layer, number) for layer, number, _ in learned] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert same(one, two)


@pytest.mark.slow
def test_two_processes(tiny_model, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(run, "LEAST_GAIN", -1e9)
    one = train(tiny_model, settings_for(texts, rounds=1), tmp_path / "one")
    monkeypatch.setattr(run, "checked_devices", lambda device: ["cpu", "cpu"])
    assert same(one, train(tiny_model, settings_for(texts, rounds=1), tmp_path / "two"))


def test_command_line(tiny_model, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    small = ["--atoms", "16", "--atom-bits", "4", "--vectors", "512", "--sequence-tokens", "64"]
    arguments = ["train", str(tiny_model), *small, "--passes", "1", "--rounds", "2", "--out", str(out)]
    assert cli.main([*arguments, "--name", "me/tiny", "--device", "cpu"]) == 0
    words = capsys.readouterr().out
    assert f"wrote {out}" in words and f"picture: {tmp_path / 'd.png'}" in words
    assert "round 2/2  layer   1  energy lost  key s=7 0." in words and "round 1/2  mean " in words
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(out), "--no-plot"]) == 0
    words = capsys.readouterr().out
    for expected in ("dictionary of me/tiny", "llama, 2 layers, 2 KV heads of 16", "sampled from the model", " mean "):
        assert expected in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "x", "--atoms", "5000"], "--atoms is 5000; allowed: 2 to 4096"),
        (["train", "x", "--sparsity", "32"], "--sparsity is 32; allowed: 1 to 31"),
        (["train", "x", "--passes", "0"], "--passes is 0; allowed: 1 or more"),
        (["train", "x", "--rounds", "0"], "--rounds is 0; allowed: 1 or more"),
        (["train", "x", "--vectors", "8191"], "--vectors is 8191; allowed: 8192 or more (2 an atom)"),
        (["train", "x", "--sequence-tokens", "63"], "--sequence-tokens is 63; allowed: 64 or more"),
        (
            ["train", "x", "--data", "absent.txt"],
            "--data is absent.txt; allowed: files and folders that exist, or a Hugging",
        ),
        (["train", "x", "--device", "abacus"], "--device is abacus; allowed: cpu, cuda"),
        (["inspect", "absent.safetensors"], "there is no dictionary file absent.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
