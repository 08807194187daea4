"""Training that is interrupted, runs out of memory, or adapts a dictionary that is there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_runs import LEARN, settings_for, train

from vllm_lexico import cli
from vllm_lexico.train import rounds
from vllm_lexico.train.identity import file_checksum
from vllm_lexico.train.layer_learners import LayerLearners, Parent
from vllm_lexico.train.rounds import rounds_name
from vllm_lexico.train.run import kept_words
from vllm_lexico.train.settings import Plan
from vllm_lexico.train.writing import TEXT


def test_what_interrupts_a_run_says_what_is_kept_and_how_to_go_on(tiny_model, tmp_path, texts, learned, capsys):
    out = tmp_path / "d.safetensors"
    small = ["--atoms", "16", "--vectors", "512", "--sequence-tokens", "64", "--passes", "1", "--device", "cpu"]
    command = ["train", str(tiny_model), "--data", *texts, *small, "--rounds", "3", "--out", str(out)]
    first = "nothing is finished yet that could be kept"
    for stop_at, words in ((0, first), (2, f"2 of 3 rounds are kept in {out}.partial")):
        learned.clear()
        learned.stop_at = stop_at
        assert cli.main(command) == 130
        said = capsys.readouterr()
        assert f"interrupted; {words}" in said.err and "the same command goes on from there" in said.err
    assert "round 2/3  mean " in said.out and "  layer " not in said.out


@pytest.mark.parametrize(
    ("text", "rounds_done", "rounds", "words"),
    [
        (True, 0, 1, "the text and 0 of 1 round are kept in d.partial"),
        (False, 1, 1, "1 of 1 round is kept in d.partial"),
        (False, 1, 2, "1 of 2 rounds are kept in d.partial"),
    ],
)
def test_one_round_is_singular(text, rounds_done, rounds, words):
    facts = {TEXT: {} if text else None, rounds_name([0]): {"rounds_done": rounds_done}}
    run = SimpleNamespace(folder="d.partial", facts=facts.get)
    assert kept_words(run, [("cpu", [0])], Plan(rounds, 1, 1, 1)) == words


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("load_model", "loading the model takes more than there is memory; .* a smaller --dtype"),
        ("capture", "reading takes more than there is memory; lower --sequence-tokens, as to 1024, or raise --rounds"),
        ("learn", "learning takes more than there is memory; raise --rounds.*or lower --atoms, as to 2048"),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_too_little_memory_says_what_to_set(tiny_model, tmp_path, texts, monkeypatch, place, words, error):
    def full(*_, **__):
        raise error("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(*((LayerLearners, place) if place == "learn" else (rounds, place)), full)
    with pytest.raises(ValueError, match=words):
        train(tiny_model, settings_for(texts), tmp_path / "d.safetensors")


def test_a_dictionary_is_adapted_from_its_own_atoms(tiny_model, tmp_path, texts):
    """Learned from at no rate they stay what they were, whatever number of atoms is asked for; else they move."""
    parent = tmp_path / "parent.safetensors"
    small = {"rounds": 1, "passes": 1, "vectors": 256}
    own = train(tiny_model, settings_for(texts, **small), parent)
    small |= {"continue_from": str(parent), "seed": 3}
    still = settings_for(texts[:1], **small, learn=replace(LEARN, rate=1e-9, atoms=8))
    kept = train(tiny_model, still, tmp_path / "kept.safetensors")
    moved = train(tiny_model, settings_for(texts[:1], **small), tmp_path / "moved.safetensors")
    atoms = [made.tensors["value_atoms"].int() for made in (own, kept, moved)]
    assert (atoms[1] - atoms[0]).abs().max() <= 1 < (atoms[2] - atoms[0]).abs().max()
    assert not torch.equal(kept.tensors["value_mean"], own.tensors["value_mean"])  # of the other text
    assert kept.info.recipe["parent"]["sha256"] == file_checksum(parent)
    assert kept.info.recipe["parent"]["model"] == "me/tiny" and not kept.shared and kept.info.atoms == 32


def test_what_does_not_fit_is_not_adapted(tiny_model, tmp_path, texts, capsys):
    made = train(tiny_model, settings_for(texts, rounds=1, passes=1), tmp_path / "d.safetensors")
    other = replace(made.info.fingerprint, rope='{"rope_theta": 5.0}', num_layers=2)
    replace(made, info=replace(made.info, model_name="its/own", fingerprint=other)).save(tmp_path / "o.safetensors")
    command = ["train", str(tiny_model), "--data", texts[0], "--device", "cpu", "--out", str(tmp_path / "new")]
    assert cli.main([*command, "--continue-from", str(tmp_path / "o.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "o.safetensors, a dictionary of its/own, and does not fit (rope: " in said
    assert "allowed: a dictionary of the same shape and rotary embedding" in said
    assert cli.main([*command, "--continue-from", str(tmp_path / "d.safetensors"), "--atoms", "16"]) == 2
    assert "--atoms is 16; allowed: none with --continue-from, whose file decides it" in capsys.readouterr().err
    assert cli.main([*command, "--continue-from", str(tmp_path / "absent")]) == 2
    assert "there is no dictionary file" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_atoms_are_as_they_were_where_vectors_are_stretched_otherwise():
    """A vector and its atom are parallel before and after."""
    atoms = torch.nn.functional.normalize(torch.randn(1, 2, 3, 5, 4), dim=-1)
    atoms[..., 0, :] = 0
    before, after = torch.rand(2, 1, 2, 3, 4) + 0.5
    moved = Parent(atoms, before).atoms_at(after, slice(0, 1), shared=False)
    expected = torch.nn.functional.normalize(atoms * before[:, :, :, None] / after[:, :, :, None], dim=-1)
    torch.testing.assert_close(moved, expected)
    assert Parent(atoms[:, :, :1], before).atoms_at(after, slice(0, 1), shared=True).shape == (1, 2, 1, 5, 4)
    torch.testing.assert_close(Parent(atoms, before).atoms_at(before, slice(0, 1), shared=False), atoms)
