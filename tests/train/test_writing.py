"""The text of a run that vLLM writes: kept, used by the rounds, and in one line why not. A program stands for vLLM."""

import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from writers import DIES, FAILS, FAILS_WITH_GRAPHS, HANGS, WRITES

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train import rounds, vllm_writer, writing
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.own_text import sequences_from_model
from vllm_lexico.train.progress import Progress, Stage
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import TrainSettings
from vllm_lexico.train.state import RunFolder
from vllm_lexico.train.vllm_writer import WriterJob
from vllm_lexico.train.writing import own_text, written_rows

JOB = WriterJob("some/model", "", 640, 64, "cpu", "auto", 3, "")


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "d.partial", {"seed": 3})
    run.folder.mkdir()
    return run


def write(run, writer="auto", progress=None):
    progress = progress or Progress([Stage("write", "writing", 640, 1.0)], shown=False)
    return own_text(writer, JOB, run, "cpu", progress)


def test_what_was_written_is_kept_and_not_written_again(stand_in, folder):
    stand_in(WRITES)
    progress = Progress([Stage("write", "writing", 640, 1.0), Stage("read", "reading", 1, 1.0)], shown=False)
    assert write(folder, progress=progress) == {"writer": "vLLM 9", "tokens": {"bare": 640}}
    assert progress.stages[0].ended and progress.stages[0].done == 640
    rows = written_rows(folder, 64)
    assert rows.shape == (10, 64) and rows[0, :3].tolist() == [2, 3, 4]
    stand_in(DIES)
    progress = Progress([Stage("write", "writing", 640, 1.0), Stage("read", "reading", 1, 1.0)], shown=False)
    assert write(folder, progress=progress) == {"writer": "vLLM 9", "tokens": {"bare": 640}}
    assert [stage.kind for stage in progress.stages] == ["read"]


@pytest.mark.parametrize(
    ("program", "reason"), [(FAILS, "ValueError: no such architecture"), (DIES, "CUDA error: no luck")]
)
def test_why_not_in_one_line(stand_in, folder, capsys, program, reason):
    stand_in(program)
    assert write(folder, progress=Progress([Stage("write", "writing", 640, 1.0)])) is None
    words = capsys.readouterr().out
    assert words == f"vLLM cannot write the text ({reason}), so transformers does, which takes longer\n"
    assert written_rows(folder, 64) is None
    with pytest.raises(ValueError, match=f"--writer vllm: vLLM cannot write text with some/model .{reason}.*--data"):
        write(folder, "vllm")


def test_nothing_is_left_of_what_vllm_puts_into_the_folder_for_such_files(stand_in, folder, tmp_path, monkeypatch):
    """Its process ends at once, so that what would be removed when it ends stays."""
    leaves = "import pathlib, tempfile\npathlib.Path(tempfile.gettempdir(), 'left').touch()\n"
    stand_in(WRITES.replace("import numpy\n", leaves + "import numpy\n"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert write(folder) is not None
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_is_tried_again_without_graphs(stand_in, folder, capsys, device):
    stand_in(FAILS_WITH_GRAPHS)
    progress = Progress([Stage("write", "writing", 640, 1.0)])
    wrote = own_text("auto", replace(JOB, device=device), folder, f"{device}:0", progress)
    said = capsys.readouterr().out
    if device == "cpu":  # nothing that a second try would do otherwise
        assert wrote is None and "again" not in said
    else:
        assert wrote == {"writer": "vLLM 9", "tokens": {"bare": 640}}
        assert "no graph" in said and "again without CUDA graphs" in said and "transformers" not in said


@pytest.mark.parametrize("graphs", [True, False])
def test_an_engine_on_a_gpu_captures_graphs(monkeypatch, graphs):
    monkeypatch.setattr(vllm_writer.torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    arguments = vllm_writer.engine_arguments(replace(JOB, device="cuda", graphs=graphs), False)
    assert arguments["gpu_memory_utilization"] == 0.72
    assert ("compilation_config" in arguments, "enforce_eager" in arguments) == (graphs, not graphs)
    assert max(vllm_writer.GRAPHS) == arguments["max_num_seqs"]


def test_transformers_goes_on_with_what_it_began(stand_in, folder, monkeypatch):
    stand_in(DIES)
    assert write(folder, "transformers") is None
    monkeypatch.setattr(writing, "has_vllm", lambda: False)
    assert write(folder) is None
    stand_in(WRITES)
    (folder.folder / "layers_000_rounds.state").touch()
    assert write(folder) is None


def test_an_interrupted_writer_is_ended(stand_in, folder):
    stand_in(HANGS)

    class Interrupted(Progress):
        def advance(self, work):
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        write(folder, progress=Interrupted([Stage("write", "writing", 640, 1.0)], shown=False))
    assert time.monotonic() - started < 60 and not folder.has_state()


def test_which_gpu_it_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    threads = str(writing.torch.get_num_threads())
    assert writing._seen("cpu", 1) == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    assert writing._seen("cuda:1", 1) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert writing._seen("cuda:0", 4) == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert (
        writing._seen("cuda:1", 1) == {"CUDA_VISIBLE_DEVICES": "7"}
        and writing._seen("cuda:0", 1)["CUDA_VISIBLE_DEVICES"] == "5"
        and writing._seen("cuda:0", 2)["CUDA_VISIBLE_DEVICES"] == "5,7"
    )


def test_a_run_learns_from_what_was_written(stand_in, tiny_model, tmp_path, monkeypatch):
    stand_in(WRITES)
    read, capture = [], rounds.capture

    def noted(model, sequences, *arguments, **more):
        read.append(sequences)
        return capture(model, sequences, *arguments, **more)

    monkeypatch.setattr(rounds, "capture", noted)
    learn = LearnSettings(atoms=16, sparsity=4, batch=128)
    given = TrainSettings(learn=learn, vectors=400, passes=1, rounds=2, sequence_tokens=64, writer="auto")
    out = train_dictionary(str(tiny_model), given, name="me/tiny", out=tmp_path / "d.safetensors", device="cpu")
    whole = torch.cat(read)
    assert [len(rows) for rows in read] == [1, 3, 3]
    assert whole.flatten().tolist() == [at % 26 + 2 for at in range(whole.numel())]  # all of it, nothing twice
    info = load_dictionary(out).info
    assert info.recipe["own_text"]["writer"] == "vLLM 9" and info.recipe["passes"] == 1
    assert ("own text", "writer vLLM 9, tokens (bare 448)") in info.recipe_words()
    assert not list(tmp_path.glob("*.partial"))


class Engine:
    """Three texts, of which two have a place; one ends after two steps."""

    def __init__(self):
        self.steps = 0

    def get_num_unfinished_requests(self):
        return 3 if self.steps < 2 else 1

    def step(self):
        self.steps += 1
        return ["output", self.steps]


def test_an_engine_tells_how_much_is_written(monkeypatch):
    told, engine = [], Engine()
    monkeypatch.setattr(vllm_writer, "REPEAT_SECONDS", -1.0)
    vllm_writer._count_steps(engine, 2, 100, told.append)
    assert [engine.step() for _ in range(3)] == [["output", 1], ["output", 2], ["output", 3]]
    assert told == [102, 104, 105]
    vllm_writer._count_steps(engine, 2, 7, told.append)  # of the next wave: it counts anew, and once
    engine.step()
    assert told[3:] == [8]


def test_a_model_that_computes_no_numbers_writes_nothing(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert sequences_from_model(model, 8, 2, 0, 2).shape == (2, 8)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="computes numbers that are not finite, so it writes no text"):
        sequences_from_model(model, 8, 2, 0, 2)
