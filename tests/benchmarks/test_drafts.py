"""What the benchmark of drafts makes of its engines' counts; the engines themselves need a GPU to say anything."""

import argparse
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def drafts(import_benchmark):
    return import_benchmark("drafts")


@pytest.fixture(scope="module")
def counts(drafts, load_benchmark):
    return load_benchmark("bench/draft_counts")


def test_an_end_that_repeats_is_a_loop(counts):
    passage = list(range(20))
    assert counts.loops([7] + 4 * passage) and counts.loops([1, 2, 3, 4, 4, 4, 4])
    assert not counts.loops([7] + 3 * passage) and not counts.loops(4 * passage + [7])


@pytest.mark.parametrize(
    ("accepted", "answers", "verdict"),
    [(790, 400, "within"), (700, 400, "not within"), (770, 8, "not shown"), (750, 8, "not shown")],
)
def test_a_few_answers_do_not_show_what_many_do(counts, accepted, answers, verdict):
    """Shares of single answers are between 0 and 1, as they are where some loop; the mean share is the one given."""
    shares = random.Random(0)
    ours, theirs = [], []
    for _ in range(answers // 2):
        off = shares.randint(0, 100)
        theirs += [counts.Answered(800 + way * off, 1000, False) for way in (1, -1)]
        own = shares.randint(0, 100)
        ours += [counts.Answered(accepted + way * own, 1000, False) for way in (-1, 1)]
    found = counts.apart(ours, theirs)
    assert (found.ours, found.theirs) == (accepted / 1000, 0.8)
    assert found.low < found.difference < found.high and found.verdict == verdict
    variance = sum((a.accepted - accepted - b.accepted + 800) ** 2 for a, b in zip(ours, theirs, strict=True))
    half = 1.96 * math.sqrt(variance) / answers / 1000  # as many drafts in all answers: the mean of differences
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_answers_that_loop_are_left_out_in_pairs(counts):
    plain, looping = counts.Answered(5, 10, False), counts.Answered(10, 10, True)
    found = counts.straight([plain, looping, plain], [plain, plain, looping])
    assert found == (0.5, 0.5, 0, 0) and counts.apart([plain] * 2, [counts.Answered(0, 0, False)] * 2) is None


def counted(accepted, loops):
    """48 answers with about as many drafts accepted each, of which some loop."""
    answers = [(accepted + at % 3 - 1, 1000, at < loops) for at in range(48)]
    return {"tokens": 300, "answers": answers, "tokens_per_s": 5.0}


def arguments(tmp_path, **more):
    asked = {"requests": 48, "answer": 300, "brief": 0, "sampled": 48, "sampled_tokens": 300, "longest": 8000}
    given = {"model": "M/model", "drafts": {"method": "ngram"}, "rounded": None, "lexico": {}, "peer": "FLASH_ATTN"}
    return argparse.Namespace(**asked, **given, results=tmp_path, at_once=True, **more)


@pytest.mark.parametrize(("accepted", "fails"), [(780, False), (760, True)])
def test_shares_are_compared_with_the_peers(drafts, tmp_path, monkeypatch, accepted, fails):
    found = {
        ("FLASH_ATTN", True): {"greedy": counted(800, 1), "sampled": counted(500, 0)},
        ("LEXICO", True): {"greedy": counted(accepted, 2), "sampled": counted(490, 0)},
    }
    monkeypatch.setattr(drafts, "run_engines", lambda args: found)
    if fails:
        with pytest.raises(SystemExit, match=r"greedy: -0\.040 .* 3 points: not within, against FLASH_ATTN"):
            drafts.orchestrate(arguments(tmp_path))
    else:
        drafts.orchestrate(arguments(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "drafts.jsonl").read_text().splitlines()]
    shares = {row["case"]["answers"]: row for row in rows if row["metric"] == "accepted_share"}
    assert shares["greedy"]["ratio"] == pytest.approx(accepted / 800)
    assert shares["sampled"]["ratio"] == pytest.approx(0.98)
    low, difference, high = shares["greedy"]["case"]["apart"]
    assert low <= difference <= high and difference == pytest.approx(accepted / 1000 - 0.8)
    assert shares["greedy"]["case"]["verdict"] == ("not within" if fails else "within")
    loops = [(row["value"], row["case"]["peer_looping_answers"]) for row in rows if row["metric"] == "looping_answers"]
    assert loops == [(2, 1), (0, 0)] and len(rows) == 4


def test_what_an_engine_has_answered_is_kept_where_it_is_ended(drafts, tmp_path, monkeypatch):
    found = {
        ("FLASH_ATTN", True): {"greedy": counted(800, 1), "sampled": counted(500, 0)},
        ("LEXICO", True): {"greedy": counted(800, 1)},
    }
    monkeypatch.setattr(drafts, "run_engines", lambda args: found)
    with pytest.raises(SystemExit, match="LEXICO failed, or was ended, before it gave sampled answers"):
        drafts.orchestrate(arguments(tmp_path))
    assert len((tmp_path / "drafts.jsonl").read_text().splitlines()) == 2


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
