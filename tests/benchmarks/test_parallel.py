"""What the benchmark of several GPUs makes of its engines' answers and times, and how it runs them."""

import subprocess
import sys
import time
import types

import pytest
import torch


@pytest.fixture(scope="module")
def parallel(import_benchmark):
    return import_benchmark("parallel")


@pytest.fixture(scope="module")
def exact(parallel):
    return parallel.parallel_exact


def said(first=-0.1, tokens=(5, 6, 7, 8), hits=128, **counts):
    """What an engine found: one answer, whose first token has this log-probability."""
    steps = [{token: first if at == 0 else -0.2, 99: -9.0} for at, token in enumerate(tokens)]
    return {"plain": {"answers": [{"tokens": list(tokens), "steps": steps}], "counts": {"hits": hits, **counts}}}


NAMES = ("exact TP 2", "FLASH_ATTN TP 2", "FLASH_ATTN TP 1")


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        (said(-0.16), ""),
        (said(-0.2), "more than 1.25 times"),
        (said(tokens=(9, 6, 7, 8)), "agree for 0 tokens"),
        (said(tokens=(5, 6, 7, 9)), "no tie"),
    ],
)
def test_the_exact_codec_is_judged_by_the_distance_of_its_peer_from_itself(exact, ours, fault):
    (pair,) = [pair for pair in exact.pairs("FLASH_ATTN", 2) if pair.one == NAMES[0] and pair.other == NAMES[1]]
    found = dict(zip(NAMES, (ours, said(-0.1), said(-0.15)), strict=True))
    verdict = exact.judge(pair, found)
    assert bool(verdict.fault) == bool(fault) and fault in verdict.fault
    assert ("TOO FAR" in verdict.words) == bool(fault)
    ((case, metric, value, peer, theirs), _), *_ = exact.rows(verdict, found, {"gpus": 2})
    assert (metric, peer, theirs) == ("logprob_gap_mean", "FLASH_ATTN TP 2 from FLASH_ATTN TP 1", pytest.approx(0.0125))
    assert value == verdict.row["mean"] and case["hits"] == [128, 128] and case["gpus"] == 2
    del found["FLASH_ATTN TP 1"]
    assert exact.judge(pair, found) is None


def test_every_compared_engine_is_started_and_drafts_are_counted(exact):
    kinds = exact.engines("FLASH_ATTN", 2, "d.safetensors")
    pairs = exact.pairs("FLASH_ATTN", 2)
    assert {name for pair in pairs for name in pair[:4]} == set(kinds)
    assert (
        kinds["codes TP 2"].settings["tensor_parallel_size"] == 2
        and "speculative_config" not in kinds["codes TP 2"].settings
    )
    assert kinds["exact PP 2"].settings["pipeline_parallel_size"] == 2
    (pair,) = [pair for pair in pairs if pair.one.endswith("drafts")]
    drafting = said(accepted=30, drafted=50), said(accepted=40, drafted=60)
    found = {pair.one: drafting[0], pair.other: drafting[1], pair.near: said(), pair.far: said()}
    *_, ((case, metric, value, peer, theirs), words) = exact.rows(exact.judge(pair, found), found, {})
    assert (metric, value, peer, theirs) == ("accepted_drafts", 30, pair.other, 40)
    assert (case["drafted"], case["peer_drafted"]) == (50, 60) and "30 of 50" in words


def test_ratios_on_all_ranks_stand_beside_those_on_one(parallel):
    speed = parallel.parallel_speed
    results = {
        "whole": {"FLASH_ATTN": {"ttft_seconds": 0.5}, "LEXICO-15": {"ttft_seconds": 0.7}},
        "part": {"FLASH_ATTN": {"ttft_seconds": 0.4}, "LEXICO-15": {"ttft_seconds": 0.5}, "fp8": {}},
    }
    cases = {"whole": {"tensor_parallel": 2}, "part": {"tensor_parallel": 1}}
    rows = speed.rows(results, cases, {"LEXICO-15": 12.5})
    assert [(row[1], row[3]) for row in rows] == [
        ("ttft_seconds", "FLASH_ATTN"), ("ttft_seconds", "FLASH_ATTN"), ("ttft_seconds_ratio", "one rank's part alone"),
    ]  # fmt: skip
    assert rows[-1][2] == pytest.approx(1.4) and rows[-1][4] == pytest.approx(1.25)
    assert [speed.is_apart(row) for row in rows] == [False, False, True] and "NOT within" in speed.words(rows[-1])
    results["part"]["LEXICO-15"] = {"ttft_seconds": 0.55}
    assert "within 10 %" in speed.words(speed.rows(results, cases, {"LEXICO-15": 12.5})[-1])
    assert speed.metrics("decode", {"spread": {"tokens_per_second": 3.0}}) == {"decode_tokens_per_second": 3.0}


def test_a_rank_s_part_has_its_heads_columns_and_words(parallel):
    speed = parallel.parallel_speed
    part = speed.part_of_rank(speed.LLAMA_3_1_70B, 2)
    assert (part["num_attention_heads"], part["num_key_value_heads"], part["intermediate_size"]) == (32, 4, 14336)
    assert part["hidden_size"] == 8192 and part["head_dim"] == 128
    with pytest.raises(ValueError, match="3 ranks do not divide"):
        speed.part_of_rank(speed.LLAMA_3_1_70B, 3)


def test_fewer_gpus_than_asked_for_are_refused_in_a_sentence(root):
    more = torch.cuda.device_count() + 2
    command = [sys.executable, root / "benchmarks" / "parallel.py", "--gpus", more]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 2 and f"--gpus was given as {more}; allowed: 2" in result.stderr
    assert "run this on a machine" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def three_heads(write_letters_model, tmp_path_factory):
    return write_letters_model(tmp_path_factory.mktemp("three-heads"), 2, 3)


def test_added_heads_change_no_answer(parallel, three_heads, tmp_path):
    from transformers import AutoModelForCausalLM

    more = parallel.more_heads.write_model_with_more_heads(three_heads, 2, tmp_path / "more")
    before, after = (AutoModelForCausalLM.from_pretrained(model).eval() for model in (three_heads, more))
    assert (after.config.num_key_value_heads, after.config.num_attention_heads) == (4, 8)
    tokens = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(before(tokens).logits, after(tokens).logits)
    assert (more / "tokenizer.json").exists()
    assert parallel.more_heads.write_model_with_more_heads(more, 2, tmp_path / "again") == more


@pytest.mark.parametrize("shared", [False, True])
def test_a_dictionary_serves_added_heads_as_those_that_they_repeat(parallel, three_heads, tmp_path, shared):
    from dataclasses import replace

    from vllm_lexico.dictionary.file import load_dictionary

    shape = parallel.write_model(tmp_path / "shape", parallel.json.loads((three_heads / "config.json").read_text()))
    given = load_dictionary(parallel.write_random_dictionary(shape, atoms=16))
    tensors = dict(given.tensors)
    for kv in ("key", "value"):  # means by which heads can be told apart
        tensors[f"{kv}_mean"] = tensors[f"{kv}_mean"] + torch.arange(3.0).view(1, 3, 1)
    if shared:
        tensors |= {f"{kv}_atoms": given.tensors[f"{kv}_atoms"][:, 0].contiguous() for kv in ("key", "value")}
    replace(given, tensors=tensors).save(tmp_path / "given.safetensors")
    model = parallel.more_heads.write_model_with_more_heads(three_heads, 2, tmp_path / "more")
    out = tmp_path / "more.safetensors"
    written = load_dictionary(
        parallel.more_heads.write_dictionary_with_more_heads(tmp_path / "given.safetensors", model, out)
    )
    assert written.info.fingerprint.num_kv_heads == 4 and written.shared == shared
    for name in ("key_atoms", "key_mean", "value_stretch"):
        if "atoms" not in name or not shared:
            assert torch.equal(written.tensors[name][:, 3], written.tensors[name][:, 0]), name
    assert not torch.equal(written.tensors["key_mean"][:, 3], written.tensors["key_mean"][:, 1])
    again = parallel.more_heads.write_dictionary_with_more_heads(out, model, tmp_path / "not-written")
    assert again == out


def test_trainings_are_compared_by_what_their_files_hold(parallel, three_heads, tmp_path):
    train = parallel.parallel_train
    config = parallel.json.loads((three_heads / "config.json").read_text())
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        files.append(
            parallel.write_random_dictionary(parallel.write_model(tmp_path / name, config), atoms=16, seed=seed)
        )
    first, same, other = (
        train.Trained(file, seconds, 1.0, 2.0) for file, seconds in zip(files, (9, 8, 4), strict=True)
    )
    rows = {row[1]: row for row, _ in train.rows([first, same, other], 2, "m")}
    assert rows["train_seconds"][2:] == (4, "one GPU", 8)
    assert rows["tensors_that_differ"][2:] == (3, "one GPU from itself", 0)  # both atoms, and what is asked
    assert rows["atoms_that_differ"][2] > 0.5
    hashes = rows["loss_apart"][0]["sha256"]
    assert hashes[0] == hashes[1] != hashes[2]


SERVES = """
import json, os, subprocess, sys, time
settings = json.loads(sys.stdin.readline())
if settings["how"] == "dies":
    sys.exit("as it was told")
print('engine=["ttft", {"gpus": "%s"}, 1.0]' % os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if settings["how"] == "hangs":
    time.sleep(600)
"""


def test_what_dies_or_hangs_costs_only_its_own(parallel, tmp_path, monkeypatch):
    from bench import parallel_jobs

    monkeypatch.setattr(parallel_jobs, "LEAST_SECONDS", 0.5)
    script = tmp_path / "serves.py"
    script.write_text(SERVES)
    options = types.SimpleNamespace(logs=tmp_path, shrink=1, steps=1, answer_tokens=1, turns=1, engine_seconds=60)
    kept = parallel.Kept(tmp_path)

    def job(name, how, gpus=()):
        return parallel.Job(name, ("ttft",) if how != "hangs" else ("ttft", "decode"), {"how": how}, gpus)

    waves = [
        [job("dies TP 2", "dies"), job("one", "answers", ("1",))],
        [job("hangs", "hangs")],
        [job("late", "answers")],
    ]
    began = time.monotonic()
    results = [(one.name, measure, result["gpus"]) for one, measure, result in
               parallel.run_jobs(waves, str(script), options, began + 4, kept)]  # fmt: skip
    assert [row[:2] for row in results] == [("one", "ttft"), ("hangs", "ttft")] and results[0][2] == "1"
    assert [fault.split(";")[0] for fault in kept.faults] == [
        "dies TP 2 has not measured ttft", "hangs has not measured decode", "out of time for late",
    ]  # fmt: skip
    assert "as it was told" in (tmp_path / "dies-TP-2-ttft.log").read_text() and time.monotonic() - began < 15


def test_rows_are_written_once(parallel, tmp_path, capsys):
    kept = parallel.Kept(tmp_path)
    for _ in range(2):
        kept.write(({"gpus": 2}, "train_seconds", 3.0, "one GPU", 6.0), "half")
    (line,) = (tmp_path / "parallel.jsonl").read_text().splitlines()
    assert '"ratio": 0.5' in line and capsys.readouterr().out == "half\n"


def test_a_lock_is_waited_for_but_not_for_ever(parallel, tmp_path, monkeypatch):
    from bench import parallel_jobs

    monkeypatch.setattr(parallel_jobs, "LONGEST_WAIT", 0.2)
    with parallel.held(tmp_path / "lock"):
        began = time.monotonic()
        with parallel.held(tmp_path / "lock"):
            assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    with parallel.held(tmp_path / "lock"):
        assert time.monotonic() - began < 0.2
