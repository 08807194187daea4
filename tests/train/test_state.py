"""State that a training goes on from: nothing that is damaged or foreign is taken for it."""

import logging
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_lexico.train.state import Kept, RunFolder

IDENTITY = {"model": "me/tiny", "seed": 3, "learn": {"atoms": 32, "rate": 0.5}, "data": ["a.txt"]}
KEPT = Kept(
    {"atoms": torch.arange(12.0).view(3, 4), "levels": torch.ones(2).half(), "steps": torch.tensor(7)},
    {"rounds_done": 2, "errors": {"key": {"7": [0.25]}}},
)


def same(one: Kept, other: Kept) -> bool:
    tensors = [{name: (t.dtype, t.shape, t.tolist()) for name, t in kept.tensors.items()} for kept in (one, other)]
    return tensors[0] == tensors[1] and one.facts == other.facts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one file, and the file's bytes."""
    run = RunFolder(tmp_path_factory.mktemp("state") / "d.partial", IDENTITY)
    run.folder.mkdir()
    run.save("rounds", KEPT)
    path = run.folder / "rounds.state"
    return run, path, path.read_bytes()


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Up to three things that happen to files, each anywhere in it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, value = rng.randrange(len(content) + 1), rng.randbytes(rng.choice((1, 2, 40)))
        content = rng.choice(
            (
                content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :],
                content[:at],
                content[:at] + value + content[at:],
                content[:at] + value + content[at + len(value) :],
                content[:at] + bytes(len(content) - at),
                content[:at] + content[rng.randrange(len(content) + 1) :],
            )
        )
    return content


# A seed per example: hypothesis takes far longer than this to build a list of changes.
@settings(max_examples=3000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**64 - 1))
def test_mutated_state_is_the_same_or_nothing(saved, seed):
    """A correct resume, a fresh start, or one sentence."""
    run, path, content = saved
    path.write_bytes(mutated(content, random.Random(seed)))
    logging.disable()  # of warnings, which take longer than all else
    try:
        kept = run.load("rounds")
    except ValueError as error:
        assert "another run" in str(error) and "\n" not in str(error)
    else:
        assert kept is None or same(kept, KEPT)
    finally:
        logging.disable(logging.NOTSET)


def test_what_is_saved_is_loaded(saved, caplog):
    run, path, content = saved
    path.write_bytes(content)
    assert same(run.load("rounds"), KEPT) and run.load("finished") is None and not caplog.text


def test_damage_is_told_and_passed_over(saved, caplog):
    run, path, content = saved
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level(logging.WARNING, logger="vllm.lexico"):
        assert run.load("rounds") is None
    assert f"{path} is passed over and what it held is learned again: its checksum does not match" in caplog.text


def test_types_are_part_of_the_checksum(saved):
    run, path, content = saved
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))
    assert run.load("rounds") is None


def test_a_file_of_another_program_is_passed_over(saved):
    run, path, _ = saved
    save_file(KEPT.tensors, path, {"identity": "[" * 100_000, "facts": "{}", "sha256": "0"})
    assert run.load("rounds") is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 4}, "seed 3 there and 4 here"),
        ({"learn": {"atoms": 64, "rate": 0.5}}, r'learn {"atoms": 32, "rate": 0.5} there and'),
        ({"text": {"a.txt": "0" * 64}}, "another text"),
    ],
)
def test_another_run_is_refused_before_it_is_touched(saved, other, words):
    run, path, content = saved
    path.write_bytes(content)
    foreign = RunFolder(run.folder, IDENTITY | other)
    with pytest.raises(ValueError, match=r"d\.partial holds rounds of another run") as error, foreign.locked():
        pass
    assert words in str(error.value) and str(error.value).endswith("delete it, or repeat that run as it was")
    assert path.read_bytes() == content


def test_a_folder_without_state_leaves_nothing(tmp_path):
    run = RunFolder(tmp_path / "d.partial", IDENTITY)
    with run.locked():
        (run.folder / ".rounds.state.1a2b.tmp").touch()  # of a process that was killed while it wrote
    assert not list(tmp_path.iterdir())
    with run.locked():
        run.save("rounds", KEPT)
    assert [path.name for path in run.folder.glob("*.state")] == ["rounds.state"]
    with run.locked():
        (run.folder / "mine.txt").touch()
        run.remove()
    assert [path.name for path in run.folder.iterdir()] == ["mine.txt"]
