"""What the benchmark of drafts makes of its engines' counts; the engines themselves need a GPU to say anything."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def drafts(import_benchmark):
    return import_benchmark("drafts")


def test_an_end_that_repeats_is_a_loop(drafts):
    passage = list(range(20))
    assert drafts.loops([7] + 4 * passage) and drafts.loops([1, 2, 3, 4, 4, 4, 4])
    assert not drafts.loops([7] + 3 * passage) and not drafts.loops(4 * passage + [7])


def counted(accepted, loops):
    return {"answers": 48, "tokens": 300, "accepted": accepted, "drafted": 1000, "tokens_per_s": 5.0, "loops": loops}


@pytest.mark.parametrize(("accepted", "fails"), [(780, False), (760, True)])
def test_shares_are_compared_with_the_peers(drafts, tmp_path, monkeypatch, accepted, fails):
    found = {
        ("FLASH_ATTN", True): {"greedy": counted(800, 1), "sampled": counted(500, 0)},
        ("LEXICO", True): {"greedy": counted(accepted, 2), "sampled": counted(490, 0)},
    }
    monkeypatch.setattr(drafts, "run_engines", lambda args: found)
    args = argparse.Namespace(
        model="M/model", drafts={"method": "ngram"}, rounded=None, lexico={}, peer="FLASH_ATTN", longest=8000
    )
    args.results, args.at_once = tmp_path, True
    if fails:
        with pytest.raises(SystemExit, match=r"-0\.040 away from FLASH_ATTN"):
            drafts.orchestrate(args)
    else:
        drafts.orchestrate(args)
    rows = [json.loads(line) for line in (tmp_path / "drafts.jsonl").read_text().splitlines()]
    shares = {row["case"]["answers"]: row["ratio"] for row in rows if row["metric"] == "accepted_share"}
    assert shares == {"greedy": pytest.approx(accepted / 800), "sampled": pytest.approx(0.98)}
    loops = [(row["value"], row["case"]["peer_looping_answers"]) for row in rows if row["metric"] == "looping_answers"]
    assert loops == [(2, 1), (0, 0)] and len(rows) == 4


def test_matrices_of_layers_are_rounded(load_benchmark, tmp_path):
    torch.manual_seed(0)
    names = ("model.layers.0.up.weight", "model.layers.0.norm.weight", "lm_head.weight")
    tensors = dict(zip(names, (torch.randn(8, 128), torch.randn(128), torch.randn(8, 128)), strict=True))
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    copy = load_benchmark("bench/rounded_model").write_rounded_model(tmp_path / "model", tmp_path / "copy", bits=4)
    rounded = load_file(copy / "model.safetensors")
    assert (copy / "config.json").read_text() == "{}"
    assert all(torch.equal(rounded[name], tensors[name]) for name in names[1:])
    group = rounded[names[0]][0, :64]
    assert len(group.unique()) <= 15 and 0 < (group - tensors[names[0]][0, :64]).abs().max() < group.abs().max() / 13
