"""Models that read images too: with the exact codec LEXICO answers about an image as vLLM's own backend does.

Tiny checkpoints of the tests with their image processors; the vision tower's own attention stays vLLM's, and an image's
tokens are cached as others are. Gemma 3 sees images in both directions, which is refused, and answers to text alone.
"""

import pytest

pytest.importorskip("vllm")
from image_answers import IMAGE_TOKENS, VECTORS_OF, answer_about_images, in_a_process_with_images, letters
from image_families import FAMILIES, write_checkpoint
from written import away_from_training

APART, FAULTY_APART = 1e-4, 1e-2
FROM_TRAINING = 1e-4  # of a vector's norm, in float32
IMAGE, LONGER, OTHER, TEXT = range(4)
BEFORE_IMAGE, WITH_IMAGE = 128, 512  # tokens of whole blocks
WITH_IMAGES = ["Qwen2.5-VL", "Qwen3-VL"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(write_checkpoint(family, tmp_path_factory.mktemp("m"))) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def answers(folders):
    return in_a_process_with_images(answer_about_images, folders)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_vllms(answers, name):
    ours, theirs = (answers[name][backend] for backend in ("LEXICO", "CPU_ATTN"))
    assert ours["tokens"] == theirs["tokens"] and ours["hits"] == theirs["hits"]
    assert _apart(ours["logprobs"], theirs["logprobs"]) <= APART


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_an_image_is_read_and_its_pages_are_found_again(answers, name):
    found = answers[name]["LEXICO"]
    assert IMAGE_TOKENS[0] * IMAGE_TOKENS[1] == 120
    assert found["hits"] == [0, WITH_IMAGE, BEFORE_IMAGE, 0]
    assert _apart(found["logprobs"][IMAGE : IMAGE + 1], found["logprobs"][OTHER : OTHER + 1]) > FAULTY_APART


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fault_in_coded_pages_is_seen(answers, name):
    found = answers[name]["LEXICO"]
    assert _apart(found["logprobs"][:1], found["faulty"]) > FAULTY_APART


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_training_reads_the_text_model_as_it_is_served(answers, folders, name):
    case = folders[name], "float32", 1024, letters(33, VECTORS_OF), answers[name]["LEXICO"]["written"]
    assert away_from_training(*case)[-1] <= FROM_TRAINING


def test_images_in_both_directions_are_refused_before_weights_are_read(answers):
    refused = answers["Gemma 3"]["LEXICO"]["refused"]
    assert "seen in both directions" in refused and """--limit-mm-per-prompt '{"image": 0}'""" in refused


def _apart(ones, others):
    pairs = [pair for rows in zip(ones, others, strict=True) for pair in zip(*rows, strict=True)]
    assert len(pairs) >= 12
    return max(abs(one - other) for one, other in pairs)
