"""How often heads are asked when a text is repeated: scores against attention written out, and a model that copies."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import settings_for, train

from vllm_lexico import cli
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.train import asked
from vllm_lexico.train.asked import REPEAT, Asking, asked_most, drawn_by_repetition, measure_shares, words_for_shares
from vllm_lexico.train.capture import load_model, text_model
from vllm_lexico.train.model import read_facts

sys.path.insert(0, str(Path(__file__).parent))
from test_families import eager
from tiny_models import write_family

AROUND = Asking(1, 24, before=(3, 9, 4), after=(11, 7))


@pytest.mark.parametrize("name", ["gpt-oss", "gemma2", "qwen3-next", "llama4", "qwen2.5-vl"])
@torch.no_grad()
def test_scores_are_those_of_attention_written_out(name, tmp_path):
    """With sinks, soft caps, states and chunks beside the coded layers; queries come in several pieces."""
    folder = write_family(name, tmp_path)
    shape = read_facts(str(folder)).fingerprint
    text = torch.randint(58, (24,), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[*AROUND.before, *text.tolist(), *AROUND.after, *text.tolist()]])
    plain = text_model(eager(folder))
    attentions = plain(ids, output_attentions=True, use_cache=False).attentions
    attentions = [one for one in attentions if one is not None]
    at = dict(zip(shape.layers, attentions[-len(shape.layers) :], strict=True))
    if len(attentions) == plain.config.num_hidden_layers:
        at = {layer: attentions[layer] for layer in shape.layers}
    model = load_model(str(folder), "cpu", "float32")
    got = drawn_by_repetition(model, text, shape.layers, shape.num_kv_heads, AROUND)
    for row, layer in enumerate(shape.layers):
        drawn = at[layer][0, :, 29:, 3:27].amax(1)  # of queries that repeat, to the text: [Hq, 24]
        expected = drawn.unflatten(0, (shape.num_kv_heads, -1)).amax(1)
        torch.testing.assert_close(got[row].exp(), expected, atol=2e-5, rtol=2e-4)
        assert expected.std() > 0.01  # so that this says something


def copying_model(tiny_model, folder, copies):
    """A Llama of 3 layers and 2 KV heads of which those named copy: their first query head looks for its own token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.eye(64)
    look = torch.randn(16, 64).sign()
    look[[0, 8]] = 0  # the one pair of numbers that turns
    for layer in range(3):
        for part in ("self_attn.o_proj", "mlp.down_proj"):  # the hidden state stays the token
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    for layer, head in copies:
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"][32 * head : 32 * head + 16] = look
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"][16 * head : 16 * head + 16] = look
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in tiny_model.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("copies", [[(1, 0), (1, 1)], [(0, 1), (2, 0)]])
def test_heads_that_copy_are_the_third_that_is_asked(tiny_model, tmp_path, copies):
    """A layer, or heads of two: all of their tokens and no others, whatever the layers' order."""
    model = load_model(str(copying_model(tiny_model, tmp_path, copies)), "cpu", "float32")
    asking = Asking(2, 40, before=(0,), after=(1, 0))
    texts = torch.stack([torch.randperm(62, generator=torch.Generator().manual_seed(at))[:40] + 2 for at in range(2)])
    expected = torch.zeros(3, 2)
    for layer, head in copies:
        expected[layer, head] = 1
    assert torch.equal(measure_shares(model, texts, (0, 1, 2), 2, asking), expected)


def test_a_training_measures_the_shares_of_a_model_that_copies(tiny_model, tmp_path, texts):
    (tmp_path / "model").mkdir()
    folder = copying_model(tiny_model, tmp_path / "model", [(1, 0), (1, 1)])
    shares = train(folder, settings_for(texts[:1], rounds=1), tmp_path / "d.safetensors").tensors["asked_shares"]
    assert shares.dtype == torch.float32 and shares.shape == (3, 2)
    assert abs(float(shares.mean()) - 1 / 3) < 0.01 and shares[1].min() > 0.8 and shares[[0, 2]].max() < 0.15


def test_shares_by_hand():
    drawn = torch.tensor([[[9.0, 1, 8], [2, 3, 4]], [[7.0, 0, 5], [-1, 6, -2]]])  # the best four of twelve: 6 to 9
    torch.testing.assert_close(asked_most(drawn), torch.tensor([[2.0, 0.0], [1.0, 1.0]]) / 3)


def test_first_tokens_do_not_count(tiny_model, monkeypatch):
    """They stay exact. Here the first 13 of a text, with three before it, draw most; one head comes next."""
    drawn = torch.zeros(2, 2, 40)
    drawn[0, 1], drawn[..., :13] = 1.0, 9.0
    drawn[1, 0, 13:22] = 0.5
    monkeypatch.setattr(asked, "drawn_by_repetition", lambda *given: drawn)
    shares = measure_shares(
        load_model(str(tiny_model), "cpu", "float32"), torch.zeros(1, 40), (0, 1), 2, Asking(1, 40, before=(1, 2, 3))
    )
    torch.testing.assert_close(shares, torch.tensor([[0.0, 1.0], [9 / 27, 0.0]]))


def test_what_is_read(tiny_model, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    bare = Asking.of(tokenizer, "cpu", 1000)
    assert bare.before == (0,) and len(bare.after) == len(REPEAT.format(where="")) + 2
    assert Asking.of(None, "cpu", 1000) == Asking(2, 64)
    assert Asking.of(None, "cpu", 100) == Asking(2, 50) and Asking.of(None, "cpu", 64).tokens == 0
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}zz"
    chat = Asking.of(tokenizer, "cpu", 1000)
    assert chat.before == (0,) and chat.after[-2:] == (27, 27) and chat.after[:-2] == bare.after[:-2]
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    assert Asking.of(tokenizer, "cpu", 1000) == bare
    rows = torch.arange(100).view(5, 20)
    made = Asking(2, 30).cut(rows)
    assert Asking(2, 30).rows(20) == 4 and made.tolist() == [list(range(30)), list(range(40, 70))]
    assert Asking(9, 30).cut(rows).shape == (2, 30) and Asking(2, 500).cut(rows).shape == (1, 100)


def test_shares_are_added_to_a_file_and_nothing_else_changes(tiny_model, tmp_path, texts, capsys):
    """By the command line: from data and from own text; with refusals."""
    made = train(tiny_model, settings_for(texts, rounds=1), tmp_path / "d.safetensors")
    others = {name: tensor for name, tensor in made.tensors.items() if name != "asked_shares"}
    Dictionary(made.info, others).save(tmp_path / "old.safetensors")
    command = ["train", str(tiny_model), "--continue-from", str(tmp_path / "old.safetensors"), "--rounds", "0"]
    command += ["--device", "cpu", "--out", str(tmp_path / "new.safetensors"), "--sequence-tokens", "64"]
    for data, source in ((["--data", *texts], "a.jsonl.xz, b.txt"), ([], "the model itself")):
        assert cli.main([*command, *data, "--name", "me/tiny"]) == 0
        assert "asked most when a text is repeated: layers " in capsys.readouterr().out
        new = load_dictionary(tmp_path / "new.safetensors")
        shares = new.tensors.pop("asked_shares")
        assert shares.shape == (2, 2) and abs(float(shares.mean()) - 1 / 3) < 0.01
        assert new.tensors.keys() == others.keys() and all(torch.equal(new.tensors[n], others[n]) for n in others)
        assert new.info.recipe.pop("asked") == {"texts": 2, "tokens": 64, "of": source, "seed": 0}
        assert new.info == made.info
    (tmp_path / "new.safetensors").unlink()
    assert cli.main([*command, "--data", *texts]) == 2
    assert "a dictionary of me/tiny, and --rounds 0 would only measure" in capsys.readouterr().err
    assert cli.main(["train", str(tiny_model), "--rounds", "0", "--data", *texts]) == 2
    assert "--rounds is 0; allowed: 1 or more, and 0 with --continue-from" in capsys.readouterr().err


def test_one_text_is_singular():
    shares = torch.tensor([[0.5, 0.5]])
    assert " (0.50); 1 text of 64 tokens in " in words_for_shares(shares, [3], torch.zeros(1, 64), 0.0)
    assert " (0.50); 2 texts of 64 tokens in " in words_for_shares(shares, [3], torch.zeros(2, 64), 0.0)
