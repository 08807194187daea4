"""Data made from the hub's datasets, with a hub that is only pretended and files of the real formats."""

import json
import types
from pathlib import Path

import pytest

from vllm_lexico import cli
from vllm_lexico.evals import fetch
from vllm_lexico.evals.caches import parse_caches
from vllm_lexico.evals.settings import QUICK
from vllm_lexico.evals.tasks import TASKS, code, gsm8k, qa, windows
from vllm_lexico.train.texts import read_documents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROBLEMS = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)]
# As the dataset has it: every row ends with its line break, blank lines are rows without text.
ARTICLES = [
    "",
    " = Ada = \n",
    "",
    " Ada wrote . \n",
    "",
    " = = Life = = \n",
    " Long . \n",
    "",
    " = Bee = \n",
    " Buzz . \n",
]
# As the datasets have them: a row per question, lists of texts, splits in files of their own.
QUESTIONS = [
    {"id": str(i), "context": text, "question": f"Who {i}?", "answers": {"text": [f"it {i}"], "answer_start": [4]}}
    for i, text in enumerate(["Long ago it was.", "Long ago it was.", "Later it was not."])
]


def program(number):
    """A row of MBPP."""
    about = {"task_id": number, "text": f"Be {number}.", "code": f"x = {number}", "test_setup_code": ""}
    return about | {"test_list": [f"assert x == {number}", "assert x"], "challenge_test_list": []}


DATASETS = {
    ("google/xquad", "xquad.en/validation-00000-of-00001.parquet"): QUESTIONS,
    **{
        ("google-research-datasets/mbpp", f"full/{split}-00000-of-00001.parquet"): [program(number)]
        for split, number in (("test", 11), ("train", 601), ("validation", 511), ("prompt", 2))
    },
    ("openai/gsm8k", "main/test-00000-of-00001.parquet"): PROBLEMS,
    ("openai/gsm8k", "main/train-00000-of-00001.parquet"): PROBLEMS[::-1],
    ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"): [{"text": text} for text in ARTICLES],
    ("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"): [{"text": text} for text in ARTICLES],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache and the hub. `asked` has what was downloaded; `error` is raised in place of an answer."""
    import huggingface_hub
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = types.SimpleNamespace(asked=[], error=None, datasets=dict(DATASETS))

    def place(repo, file):
        return tmp_path / "hub" / f"datasets--{repo.replace('/', '--')}" / "snapshots" / COMMIT / file

    def head(url, timeout):
        assert "/datasets/" in url
        if fake.error is not None:
            raise fake.error

    def download(repo, file, *, repo_type, **_):
        assert repo_type == "dataset"
        fake.asked.append(file)
        path = place(repo, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(fake.datasets[repo, file]), path)
        return str(path)

    def cached(repo, file, **_):
        path = place(repo, file)
        return str(path) if path.exists() else None

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: types.SimpleNamespace(head=head))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr("vllm_lexico.check.source.config_folder", Path)  # the model is there
    return fake


def test_every_file_of_a_task_has_a_source():
    assert {file for task in TASKS.values() for file in task.DATA_FILES} == set(fetch.SOURCES)


def test_files_are_in_the_formats_that_tasks_read(hub, capsys):
    folder = fetch.fetch_data(tuple(TASKS))
    assert len(hub.asked) == 9
    assert qa.read_passages(folder / "xquad_en.jsonl.xz") == [
        ("Long ago it was.", [("Who 0?", "it 0"), ("Who 1?", "it 1")]), ("Later it was not.", [("Who 2?", "it 2")]),
    ]  # fmt: skip
    problems = code.read_problems(folder / "mbpp.jsonl.xz")
    assert [problem.number for problem in problems] == [2, 11, 511, 601]
    assert problems[1] == (11, "Be 11.", "x = 11", ("assert x == 11", "assert x"), "")
    assert gsm8k.read_problems(folder / "gsm8k_test.jsonl.xz") == PROBLEMS
    assert gsm8k.read_problems(folder / "gsm8k_train.jsonl.xz") == PROBLEMS[::-1]
    text = " = Ada = \n Ada wrote . \n = = Life = = \n Long . \n = Bee = \n Buzz . \n"
    assert windows.read_text(folder / "wikitext2_raw_test.txt.xz") == text
    books = read_documents(folder / "train_textbooks.jsonl.xz")
    assert books == ["= Ada =\n\nAda wrote .\n\n= = Life = =\n\nLong .", "= Bee =\n\nBuzz ."]
    origins = json.loads((folder / fetch.ORIGINS).read_text())
    assert origins["gsm8k_test.jsonl.xz"] == {
        "dataset": "openai/gsm8k", "file": "main/test-00000-of-00001.parquet", "revision": COMMIT,
    }  # fmt: skip
    assert set(origins) == set(fetch.SOURCES)
    assert capsys.readouterr().err.count("is made from") == 6


def test_only_what_a_task_needs_is_fetched_and_only_once(hub):
    folder = fetch.fetch_data(("wikitext",))
    assert hub.asked == ["wikitext-2-raw-v1/test-00000-of-00001.parquet"]
    hub.error = ConnectionError("offline")
    assert fetch.fetch_data(("wikitext",)) == folder and len(hub.asked) == 1


def test_the_hubs_own_cache_needs_no_network(hub):
    folder = fetch.fetch_data(("wikitext",))
    (folder / "wikitext2_raw_test.txt.xz").unlink()
    hub.error = ConnectionError("offline")
    assert (fetch.fetch_data(("wikitext",)) / "wikitext2_raw_test.txt.xz").is_file() and len(hub.asked) == 1


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub, tmp_path, capsys):
    from huggingface_hub.errors import OfflineModeIsEnabled

    for error, words in (
        (OfflineModeIsEnabled("offline"), "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or"),
        (
            ConnectionError("no\nroute"),
            "the Hugging Face hub does not answer (ConnectionError: no route): go online once",
        ),
    ):
        hub.error = error
        assert cli.main(["eval", "org/model", "--out", str(tmp_path / "out"), "--tasks", "gsm8k"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("vllm-lexico: error: main/test-00000-of-00001.parquet of the dataset openai/gsm8k")
        assert words in last and last.endswith("give --data the folder of the files that docs/quality.md names")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "place", "rows"),
    [
        ("qa", ("google/xquad", "xquad.en/validation-00000-of-00001.parquet"), [QUESTIONS[0] | {"answers": "it"}]),
        (
            "qa",
            ("google/xquad", "xquad.en/validation-00000-of-00001.parquet"),
            [QUESTIONS[0] | {"answers": {"text": [1]}}],
        ),
        ("code", ("google-research-datasets/mbpp", "full/test-00000-of-00001.parquet"), [program("11")]),
        (
            "code",
            ("google-research-datasets/mbpp", "full/test-00000-of-00001.parquet"),
            [program(1) | {"test_list": "x"}],
        ),
    ],
)
def test_fields_of_other_types_are_refused(hub, task, place, rows):
    hub.datasets[place] = rows
    with pytest.raises(ValueError, match=f"{place[1]} of the dataset {place[0]} has no texts named"):
        fetch.fetch_data((task,))


@pytest.mark.parametrize("rows", [[], [{"text": "of another dataset"}], [{"question": 1, "answer": 2}]])
def test_a_dataset_that_has_become_another_is_refused(hub, rows):
    hub.datasets["openai/gsm8k", "main/test-00000-of-00001.parquet"] = rows
    with pytest.raises(
        ValueError, match=r"main/test-00000-of-00001\.parquet of the dataset openai/gsm8k (has no|cannot)"
    ):
        fetch.fetch_data(("gsm8k",))


def test_a_damaged_download_is_refused_and_named(hub):
    folder = fetch.fetch_data(("wikitext",))
    (folder / "wikitext2_raw_test.txt.xz").unlink()
    (path,) = (folder.parent.parent.parent / "hub").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"cannot be read .* delete {path} to fetch it again"):
        fetch.fetch_data(("wikitext",))


@pytest.fixture
def asked(monkeypatch):
    """What `run_evaluation` was called with; it does not run."""
    calls = []

    def run(settings, caches, tasks, out, **_):
        calls.append((settings, [cache.name for cache in caches], tasks))
        raise ValueError("not run")

    monkeypatch.setattr("vllm_lexico.evals.run.run_evaluation", run)
    return calls


def test_quick_asks_little_and_options_come_on_top(hub, asked, tmp_path, data):
    command = ["eval", "org/model", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--quick", "--needle-samples", "10", "--gsm8k-limit", "30"]) == 2
    settings, caches, tasks = asked.pop()
    assert caches == ["lexico:15", "bf16"] and tasks == tuple(TASKS)
    assert (settings.gsm8k.limit, settings.gsm8k.shots) == (30, QUICK["gsm8k"].shots)
    assert settings.wikitext == QUICK["wikitext"] and settings.wikitext.count == 4
    assert (settings.needle.lengths, settings.needle.samples) == ((4096,), 10)
    assert (settings.qa, settings.pairs, settings.code) == (QUICK["qa"], QUICK["pairs"], QUICK["code"])
    assert settings.engine == {"enforce_eager": True}
    assert Path(settings.data) == tmp_path / "cache" / "vllm-lexico" / "eval"
    assert cli.main([*command, "--quick", "--caches", "bf16", "--data", str(data)]) == 2
    settings, caches, _ = asked.pop()
    assert caches == ["bf16"] and Path(settings.data) == data


def test_without_quick_all_is_asked(hub, asked, tmp_path, data):
    from vllm_lexico.evals.settings import DEFAULT_CACHES, EvalSettings

    assert cli.main(["eval", "org/model", "--out", str(tmp_path / "out"), "--data", str(data)]) == 2
    settings, caches, _ = asked.pop()
    assert settings == EvalSettings("org/model", str(data))
    assert caches == [cache.name for cache in parse_caches(DEFAULT_CACHES)] and hub.asked == []
