"""Training on the CPU: the pursuit, the levels, a tiny random model from text to file, and the command line."""

import json
import lzma

import pytest
import torch
from torch.nn.functional import normalize
from vllm_lexico.train.omp import pursue, rebuild

from vllm_lexico import cli
from vllm_lexico.dictionary import load_dictionary, unit_atoms
from vllm_lexico.train import run
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.learn import LearnSettings, learn_atoms, round_atoms
from vllm_lexico.train.levels import energy_lost, learn_levels
from vllm_lexico.train.run import TrainSettings, train_dictionary
from vllm_lexico.train.texts import read_documents, sequences_from_files

LEARN = LearnSettings(atoms=32, sparsity=4, epochs=2, batch=128)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Shapes here are so small that threads only wait for each other, very long when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_atoms(groups: int, size: int, dim: int, seed: int = 0) -> torch.Tensor:
    atoms = normalize(torch.randn(groups, size, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)
    atoms[:, 0] = 0
    return atoms


def sparse_vectors(atoms: torch.Tensor, rows: int, sparsity: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    groups, size, _ = atoms.shape
    indices = torch.rand(groups, rows, size - 1, generator=generator).argsort(-1)[..., :sparsity] + 1
    return rebuild(atoms, indices, torch.randn(groups, rows, sparsity, generator=generator))


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


@pytest.fixture
def texts(tmp_path):
    words = "the quick brown fox jumps over the lazy dog and some more words to read "
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": words * count}) + "\n" for count in (1, 20))
    (tmp_path / "b.txt").write_text("zzz" * 1000)
    return tmp_path


def test_pursuit_finds_sparse_codes():
    atoms = random_atoms(2, 64, 32)
    vectors = sparse_vectors(atoms, 50, 3)
    pursuit = pursue(vectors, atoms, 8)
    lost = (rebuild(atoms, pursuit.indices, pursuit.coefficients(8)) - vectors).square().sum() / vectors.square().sum()
    assert lost < 1e-3


@pytest.mark.parametrize("sparsity", [1, 4, 31])
def test_pursuit_solves_least_squares(sparsity):
    atoms = random_atoms(2, 48, 32)
    vectors = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    pursuit = pursue(vectors, atoms, 31)
    chosen = atoms[1][pursuit.indices[1, :, :sparsity]].transpose(1, 2)
    expected = torch.linalg.lstsq(chosen.double(), vectors[1, :, :, None].double()).solution.squeeze(-1)
    torch.testing.assert_close(pursuit.coefficients(sparsity)[1], expected.float(), atol=2e-3, rtol=2e-3)
    assert all(len(set(row)) == sparsity for row in pursuit.indices[1, :, :sparsity].tolist())


def test_pursuit_of_zero_and_beyond_the_span():
    atoms = random_atoms(1, 5, 8)
    vectors = torch.zeros(1, 2, 8)
    vectors[0, 1] = 3 * atoms[0, 2]
    coefficients = pursue(vectors, atoms, 5).coefficients(5)
    assert not coefficients[0, 0].any() and coefficients.isfinite().all()
    assert coefficients[0, 1, 0] == pytest.approx(3, abs=1e-4)


def test_pursuit_in_chunks_is_the_same(monkeypatch):
    atoms = random_atoms(2, 32, 16)
    vectors = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(3))
    whole = pursue(vectors, atoms, 3)
    monkeypatch.setattr("vllm_lexico.train.omp.CHUNK_BYTES", 2 * 32 * 4 * 10)
    parts = pursue(vectors, atoms, 3)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.coefficients(3), parts.coefficients(3))


def test_learning_beats_random_atoms_with_stored_integers():
    hidden = random_atoms(2, 32, 16)
    vectors = sparse_vectors(hidden, 2000, 3)
    settings = LearnSettings(atoms=32, atom_bits=4, sparsity=3, epochs=15, batch=256, learning_rate=2e-2)
    steps: list[int] = []
    integers = learn_atoms(vectors[:, :1800], settings, seed=0, on_step=lambda: steps.append(1))
    assert len(steps) == 15 * 7 and integers.dtype == torch.int8 and integers.abs().max() <= 7
    assert not integers[:, 0].any() and integers[:, 1:].any(-1).all()

    def lost(atoms: torch.Tensor) -> float:
        levels = learn_levels(vectors[:, :500], atoms)
        return energy_lost(vectors[:, 1800:], atoms, levels, [3])[3].mean().item()

    assert lost(unit_atoms(integers)) < 0.6 * lost(random_atoms(2, 32, 16, seed=9))


@pytest.mark.parametrize(("atom_bits", "least"), [(4, 0.985), (8, 0.9999)])
def test_rounding_keeps_directions(atom_bits, least):
    atoms = random_atoms(1, 64, 64)
    rounded = unit_atoms(round_atoms(atoms, atom_bits))
    assert (rounded * atoms).sum(-1)[:, 1:].min() > least
    assert not rounded[:, 0].any()


def test_levels_ascend_and_serve_every_sparsity():
    atoms = random_atoms(1, 64, 32)
    vectors = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(4))
    levels = learn_levels(vectors, atoms)
    assert levels.shape == (1, 32, 16) and not levels[:, 0].any() and levels.abs().max() <= 1
    assert (levels.diff(dim=-1) >= 0).all()
    lost = energy_lost(vectors, atoms, levels, [2, 8, 16])
    assert lost[2] > lost[8] > lost[16]
    pursuit = pursue(vectors, atoms, 8)
    exact = (rebuild(atoms, pursuit.indices, pursuit.coefficients(8)) - vectors).square().sum() / vectors.square().sum()
    assert exact < lost[8] < exact + 0.02


def test_documents_and_even_mixing(tiny_model, texts):
    from transformers import AutoTokenizer

    assert len(read_documents(texts / "a.jsonl.xz")) == 2 and len(read_documents(texts)) == 3
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sources = [texts / "a.jsonl.xz", texts / "b.txt"]
    sequences = sequences_from_files(sources, tokenizer, length=100, count=4, seed=0)
    assert sequences.shape == (4, 100)
    only_z = ((sequences == 25 + 2) | (sequences == 1)).all(1)
    assert only_z.tolist() == [False, True, False, True]
    assert torch.equal(sequences, sequences_from_files(sources, tokenizer, length=100, count=4, seed=0))


def test_bad_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n')
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match='one JSON object with a "text" field a line'):
        read_documents(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"not text; allowed: files that end in \.txt"):
        read_documents(tmp_path / "a.pdf")


def test_capture_takes_what_the_cache_would_hold(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(5))
    store = capture(model, ids, 32, [1], (2, 16), seed=0, batch=1)
    cache = model(ids, use_cache=True).past_key_values.layers[1]
    for part, vectors in enumerate((cache.keys, cache.values)):  # 48 - 16 = 32: every later position, in some order
        expected = vectors[:, :, 16:].transpose(1, 2).reshape(2, 32, -1)
        got = store[0, part].view(2, 32, -1)
        torch.testing.assert_close(got.sum(1), expected.sum(1), atol=1e-4, rtol=1e-4)
        assert torch.cdist(got, expected).min(-1).values.max() < 1e-3


def settings_for(data: tuple[str, ...] = (), **changes) -> TrainSettings:
    return TrainSettings(**({"data": data, "learn": LEARN, "vectors": 512, "sequence_tokens": 64} | changes))


def test_trained_file_resumed_and_from_own_text(tiny_model, tmp_path, monkeypatch, texts):
    out = tmp_path / "d.safetensors"
    data = (str(texts / "a.jsonl.xz"), str(texts / "b.txt"))
    learn_group, seen = run._learn_group, []

    def interrupted(captured, held_out, settings, layer, on_step):
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return learn_group(captured, held_out, settings, layer, on_step)

    monkeypatch.setattr(run, "_learn_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(str(tiny_model), settings_for(data), name="me/tiny", out=out, device="cpu")
    with pytest.raises(ValueError, match="other settings; delete it"):
        train_dictionary(str(tiny_model), settings_for(data, seed=1), name="me/tiny", out=out, device="cpu")
    train_dictionary(str(tiny_model), settings_for(data), name="me/tiny", out=out, device="cpu")
    assert seen == [0, 1, 1] and not (tmp_path / "d.safetensors.partial").exists()

    resumed = load_dictionary(out)
    assert resumed.info.model_name == "me/tiny" and resumed.info.data == "a.jsonl.xz, b.txt"
    assert resumed.info.fingerprint.head_dim == 16 and set(resumed.info.errors["key"]) == {"4", "7", "15"}
    assert all(0 < lost < 1 for part in ("key", "value") for lost in resumed.info.errors[part]["4"])
    train_dictionary(str(tiny_model), settings_for(data), name="me/tiny", out=tmp_path / "whole", device="cpu")
    whole = load_dictionary(tmp_path / "whole")
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)


def test_command_line(tiny_model, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    arguments = ["train", str(tiny_model), "--atoms", "16", "--vectors", "2048", "--epochs", "1", "--out", str(out)]
    assert cli.main([*arguments, "--name", "me/tiny", "--device", "cpu"]) == 0
    words = capsys.readouterr().out
    assert f"wrote {out}" in words and f"picture: {tmp_path / 'd.png'}" in words
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
