"""What is loaded while vLLM writes: the same file, errors as later, and how the memory of a GPU is shared."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from small_runs import settings_for
from writers import DIES, HANGS, WRITES

from vllm_lexico.train import ahead, rounds, run, vllm_writer, writing
from vllm_lexico.train.ahead import ROOM_BYTES, WORK_BYTES, Ahead, bytes_for_vllm, compile_learning
from vllm_lexico.train.in_turn import weight_bytes
from vllm_lexico.train.model import read_facts
from vllm_lexico.train.package_text import PackageRows
from vllm_lexico.train.rounds import Job
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import Plan, bytes_per_token, own_tokens
from vllm_lexico.train.state import RunFolder

GIB = 1 << 30


@pytest.fixture
def loads(monkeypatch):
    """Whether vLLM's process was there, by load of the model; what a load raises is taken from `errors` first."""

    class Loads(list):
        process, errors = None, ()

    seen, load, start = Loads(), rounds.load_model, writing.subprocess.Popen

    def noted(*arguments, **more):
        seen.append(seen.process is not None and seen.process.returncode is None)
        if seen.errors:
            raise seen.errors.pop(0)
        return load(*arguments, **more)

    def started(*arguments, **more):
        seen.process = start(*arguments, **more)
        return seen.process

    seen.errors = []
    monkeypatch.setattr(rounds, "load_model", noted)
    monkeypatch.setattr(writing.subprocess, "Popen", started)
    monkeypatch.setattr(run, "_version", lambda: "of a test")  # which starts a process, too
    return seen


@pytest.fixture
def trained(tiny_model, tmp_path, monkeypatch):
    """Train with and without loading ahead, as on a GPU with room and on one without; returns all that the file has."""
    usual = settings_for(writer="auto", package_text=0.5, rounds=2, passes=1)

    def train(name: str, room: int | None) -> tuple[dict[str, str], dict[str, bytes]]:
        monkeypatch.setattr(ahead, "bytes_for_vllm", lambda job, device: room)
        out = tmp_path / f"{name}.safetensors"
        train_dictionary(str(tiny_model), usual, name="me/tiny", out=out, device="cpu")
        with safe_open(str(out), "pt") as file:  # whose words stand in any order
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata(), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    return train


@pytest.mark.parametrize("program", [WRITES, DIES])
def test_a_file_is_the_same_as_without(stand_in, loads, trained, small_package, program):
    """With vLLM's text and, where it fails, with that of transformers, which takes the model that is there."""
    stand_in(program)
    whole = trained("whole", None)
    threads = threading.active_count()
    assert trained("ahead", GIB) == whole and threading.active_count() == threads
    assert loads == [False, True]


def test_the_package_is_tokenized_and_kernels_are_compiled_ahead(stand_in, loads, trained, small_package, monkeypatch):
    done, take = [], PackageRows.take

    def noted(self, count, number):
        kept = self._rows is not None
        rows = take(self, count, number)
        if number is not None and not kept:
            done.append(("tokenized", loads.process.returncode is None))
        return rows

    monkeypatch.setattr(PackageRows, "take", noted)
    monkeypatch.setattr(
        ahead, "compile_learning", lambda *_: done.append(("compiled", loads.process.returncode is None))
    )
    stand_in(WRITES)
    trained("ahead", GIB)
    assert done == [("tokenized", True), ("compiled", True)]
    trained("whole", None)
    assert done[2:] == [("tokenized", False)]


def test_a_text_that_is_there_is_not_waited_for(stand_in, loads, trained, small_package, learned):
    stand_in(WRITES)
    learned.stop_at = 2  # after what is learned from noise
    with pytest.raises(KeyboardInterrupt) as interrupt:
        trained("d", GIB)
    assert "the text and 0 of 2 rounds are kept" in interrupt.value.__notes__[0] and loads == [True]
    learned.stop_at = None
    stand_in(DIES)
    whole = trained("d", GIB)
    assert loads == [True, False]
    stand_in(WRITES)
    assert trained("other", None) == whole


@pytest.mark.parametrize("error", [OSError("no such file"), ValueError("lacks 3 of its weights"), KeyboardInterrupt()])
def test_what_ends_loading_ends_vllm(stand_in, loads, trained, small_package, tmp_path, error):
    stand_in(HANGS)
    loads.errors.append(error)
    started = time.monotonic()
    with pytest.raises(type(error)) as raised:
        trained("d", GIB)
    assert raised.value is error and time.monotonic() - started < 60
    assert loads == [True] and loads.process.returncode is not None and not list(tmp_path.glob("*.partial"))
    notes = getattr(error, "__notes__", [])
    assert len(notes) == isinstance(error, KeyboardInterrupt) and all("nothing is finished yet" in n for n in notes)


def test_too_little_memory_beside_vllm_is_tried_again_alone(stand_in, loads, trained, small_package):
    stand_in(WRITES)
    loads.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    assert trained("again", GIB) == trained("whole", None)
    assert loads == [True, False, False]
    loads.errors = [torch.OutOfMemoryError("CUDA out of memory")] * 2
    with pytest.raises(ValueError, match=r"loading the model takes more than there is memory; .* a smaller --dtype"):
        trained("never", GIB)
    loads.errors = [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
    with pytest.raises(ValueError, match=r"loading the model takes more than there is memory; .* a smaller --dtype"):
        trained("host", GIB)


def test_one_bar_tells_what_it_told(stand_in, trained, small_package, capsys):
    stand_in(WRITES)
    said = []
    for name, room in (("whole", None), ("ahead", GIB)):
        trained(name, room)
        said.append([line.partition(" after ")[0].split(" in ")[0] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1] and len(said[0]) == len(set(said[0])) > 3


@pytest.mark.parametrize("shared", [False, True])
def test_compiling_takes_no_random_numbers(job, monkeypatch, shared):
    job = replace(job, settings=replace(job.settings, learn=replace(job.settings.learn, shared=shared)))
    before = torch.get_rng_state()
    compile_learning(job, torch.bfloat16, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(ahead, "NOISE_BYTES", 0)
    monkeypatch.setattr(ahead, "LayerLearners", None)
    compile_learning(job, torch.bfloat16, "cpu")  # too much for what is set aside: nothing is done


@pytest.fixture
def job(tiny_model, tmp_path):
    facts = read_facts(str(tiny_model))
    settings = settings_for(writer="auto", package_text=0.5, rounds=2, passes=1)
    plan = Plan.of(settings, facts.fingerprint, 1 << 20, "cuda")
    return Job(str(tiny_model), settings, facts.fingerprint, plan, RunFolder(tmp_path / "d.partial", {}), 0.0)


def test_how_much_vllm_may_count_on(job, monkeypatch):
    weights = weight_bytes(job.model, "auto", "")
    cache = own_tokens(job.settings, job.plan) * bytes_per_token(job.settings, job.fingerprint)
    least = 3 * weights + 2 * WORK_BYTES + ROOM_BYTES + cache + 3 * GIB  # 3 % of 100 GiB
    for free, most in ((least, least - weights - WORK_BYTES), (least - 1, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 100 * GIB))
        assert bytes_for_vllm(job, "cuda:0") == most
        monkeypatch.setattr(ahead, "bytes_for_vllm", bytes_for_vllm)
        assert Ahead(job, [("cuda:0", [0, 1])], None).fits == (most is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    assert bytes_for_vllm(job, "cuda:1") == 80 * GIB - weights - WORK_BYTES
    assert bytes_for_vllm(job, "cpu") is None and bytes_for_vllm(replace(job, in_turn=True), "cuda:0") is None
    assert not Ahead(job, [("cuda:0", [0]), ("cuda:1", [1])], None).fits
    overrides = '{"quantization_config": {"quant_method": "fp8"}}'
    quantized = replace(job, settings=replace(job.settings, hf_overrides=overrides))
    assert bytes_for_vllm(quantized, "cuda:0") is None


@pytest.mark.parametrize(("free", "share"), [(80, 0.72), (60, 0.72), (40, 0.47)])
def test_vllm_counts_on_no_more_whether_ours_is_taken_or_not(monkeypatch, free, share):
    monkeypatch.setattr(vllm_writer.torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))
    wanted = vllm_writer.WriterJob("some/model", "", 640, 64, "cuda", "auto", 3, "", most_bytes=60 * GIB)
    assert vllm_writer.engine_arguments(wanted, False)["gpu_memory_utilization"] == share
