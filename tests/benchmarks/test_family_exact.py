"""What the crossing of families and settings makes of its engines' answers."""

import json

import pytest


@pytest.fixture(scope="module")
def command(import_benchmark):
    return import_benchmark("family_exact")


@pytest.fixture(scope="module")
def tiny(root):
    import runpy

    return runpy.run_path(str(root / "tests" / "engine" / "tiny_families.py"))


def said(first=-0.1, tokens=(5, 6, 7), faulty=-3.0, preemptions=0):
    """What an engine found: an answer whose first token has this log-probability, and another with a fault."""

    def row(value):
        steps = [{token: value if at == 0 else -0.2, 9: -0.3} for at, token in enumerate(tokens)]
        return {"tokens": list(tokens), "steps": steps}

    return {"answers": [row(first)], "faulty": [row(faulty)], "hits": [128], "preemptions": [preemptions]}


def judged(command, tiny, out, family, name, ours, *peers, dtype=None):
    """What is said of one engine of LEXICO's, given after its peers' answers: in float16 last, where there are two."""
    judge = command.Judge(tiny["FAMILIES"], dtype, out)
    for one, result in zip((command.PLAIN, command.OTHER, command.SQUEEZED), peers, strict=False):
        if result is not None:
            judge.take(command.Job(family, one, False), result)
    judge.take(command.Job(family, name, True), ours)
    return judge


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        (said(-0.10005), ""),
        (said(-0.1003), "up to 3.0e-04 apart"),
        (said(tokens=(5, 6, 9)), "apart"),
        (said(float("nan")), "no numbers"),
        (said(faulty=-0.1), "empty code pages are not seen"),
        ({"error": "ValueError: LEXICO cannot serve this: no"}, None),
        ({"error": "ValueError: a tensor has another shape"}, "failed with LEXICO"),
        ({"error": "RuntimeError: LEXICO"}, "failed with LEXICO"),
    ],
)
def test_float32_answers_are_judged_by_a_number(command, tiny, tmp_path, capsys, ours, fault):
    judge = judged(command, tiny, tmp_path, "Llama", "defaults", ours, said())
    assert (judge.right, judge.refused, len(judge.faults)) == (int(fault == ""), int(fault is None), int(bool(fault)))
    assert (fault or "") in " ".join(judge.faults)
    assert "Llama | defaults |" in capsys.readouterr().out


@pytest.mark.parametrize(("first", "fault"), [(-0.12, ""), (-0.2, "bfloat16 itself")])
def test_bfloat16_is_judged_by_float16(command, tiny, tmp_path, first, fault):
    judge = judged(command, tiny, tmp_path, "Qwen3-Next", "defaults", said(first), said(-0.1), said(-0.16))
    assert fault in " ".join(judge.faults) and bool(judge.faults) == bool(fault)
    (row,) = map(json.loads, (tmp_path / "exactness.jsonl").read_text().splitlines())
    assert (row["peer"], row["case"]["scenario"], row["case"]["model"]) == (
        command.OTHER,
        "defaults",
        "tiny Qwen3-Next",
    )
    assert row["peer_value"] == pytest.approx(0.02) and row["case"]["with_empty_pages"] == pytest.approx(2.9 / 3)


def test_what_is_wrong_is_said_with_its_place(command, tiny, tmp_path, capsys):
    ours, theirs = said(-0.1003), said()
    for one, token, regret in ((ours, 8, 2.0), (theirs, 7, 0.1)):  # a second answer, which parts at its last token
        steps = [{5: -0.2}, {6: -0.4}, {token: -0.5, 7: -0.5 - (token == 8) * regret, 8: -0.5 - (token == 7) * 0.1}]
        one["answers"].append({"tokens": [5, 6, token], "steps": steps})
    ours["answers"][1]["steps"][1][6] = -0.40005
    judge = judged(command, tiny, tmp_path, "Llama", "defaults", ours, theirs)
    words = "largest in answer 0 at 0, answer 1 parts at 2 (no tie, 2.00 nats)"
    assert words in capsys.readouterr().out and words in judge.faults[0]
    (row,) = map(json.loads, (tmp_path / "exactness.jsonl").read_text().splitlines())
    assert row["case"]["largest_at"] == [0, 0] and row["case"]["parted_at"] == [[1, 2, 2.0]]
    assert "3.0e-04 apart" in row["case"]["wrong"]
    assert command.where(None, [command.Place(0, 3, 0.25, tied=True)]) == "answer 0 parts at 3 (a tie, 2.5e-01 nats)"


def test_float32_is_told_from_itself_by_small_chunks(command, tiny, tmp_path, capsys):
    import argparse

    options = argparse.Namespace(settings=["defaults"], dtype=None, pieces=True)
    family = tiny["FAMILIES"]["Llama"]
    assert command.Job("Llama", command.PIECES, False) in command.jobs_of("Llama", family, options)
    judge = command.Judge(tiny["FAMILIES"], None, tmp_path, pieces=True)
    judge.take(command.Job("Llama", command.PLAIN, False), said())
    judge.take(command.Job("Llama", "defaults", True), said(-0.1003))
    assert not judge.said
    judge.take(command.Job("Llama", command.PIECES, False), said(-0.1002))
    assert "float32 itself 6.7e-05, largest 2.0e-04, 0 part" in capsys.readouterr().out
    assert judge.faults, "its noise loosens nothing in float32"


def test_small_chunks_are_compared_with_the_same_chunks(command, tiny, tmp_path):
    """Also in float32, where vLLM in other chunks may be as far from itself as is allowed."""
    judge = command.Judge(tiny["FAMILIES"], "float32", tmp_path, pieces=True)
    judge.take(command.Job("gpt-oss", command.PLAIN, False), said(-0.1))
    judge.take(command.Job("gpt-oss", command.PIECES, False), said(-0.10009))
    for name in ("small chunks", "small steps coded later", "defaults"):
        judge.take(command.Job("gpt-oss", name, True), said(-0.10015))
    assert judge.right == 2 and ["defaults" in fault for fault in judge.faults] == [True]


def test_an_engine_waits_for_those_that_it_is_judged_by(command, tiny, tmp_path):
    judge = judged(command, tiny, tmp_path, "Qwen3-Next", "few pages", said(preemptions=1), said(), said(-0.2))
    assert not judge.said
    judge.take(command.Job("Qwen3-Next", command.SQUEEZED, False), said())
    assert judge.right == 1
    alone = judged(command, tiny, tmp_path, "Llama", "few pages", said(), said(), None, said())
    assert "nothing was preempted" in " ".join(alone.faults)


def test_every_family_gets_what_means_something_for_it(command, tiny, monkeypatch):
    import argparse

    monkeypatch.delenv("VLLM_CPU_CI_ENV", raising=False)
    options = argparse.Namespace(settings=None, dtype=None, pieces=False)
    names = {
        name: {job.name for job in command.jobs_of(name, family, options) if job.coded}
        for name, family in tiny["FAMILIES"].items()
    }
    assert "windows of 64" in names["Gemma 3"] and "windows of 64" not in names["Llama"]
    stateful = {name for name, settings in names.items() if "states of steps" in settings}
    assert stateful == {"Qwen3-Next", "LFM2", "Granite 4", "Falcon-H1", "Nemotron-H"}
    assert "drafts" in names["LFM2"]
    small = {
        job.coded for job in command.jobs_of("LFM2", tiny["FAMILIES"]["LFM2"], options) if job.name == "small chunks"
    }
    assert small == {False, True}
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    assert "drafts" not in {job.name for job in command.jobs_of("LFM2", tiny["FAMILIES"]["LFM2"], options)}
    changed = [job for job in command.jobs_of("Gemma 3", tiny["FAMILIES"]["Gemma 3"], options) if not job.coded]
    assert {"vLLM", "vLLM with few pages", "windows of 64"} <= {job.name for job in changed}
    assert "vLLM in float16" not in {job.name for job in changed}
