"""Drafts by a model: with the exact codec LEXICO answers, and accepts drafts, as vLLM's own backend does.

Tiny checkpoints with strong random weights in float32: a head of EAGLE3, a MiMo that predicts a token more, a draft
model of a shape of its own and one that is right now and then. On a GPU the same checkpoints run in bfloat16.
"""

import pytest

pytest.importorskip("vllm")
from draft_answers import (
    LENGTHS,
    NUM_DRAFTS,
    answer_with_drafts,
    write_draft_model,
    write_eagle3,
    write_mimo,
    write_own_draft_model,
)
from processes import in_a_process

CHUNKS = {"max_model_len": 2048, "max_num_batched_tokens": 256, "enable_prefix_caching": True, "block_size": 64}
BACKENDS = ("CPU_ATTN", "LEXICO")
KINDS = ("EAGLE3", "MTP", "draft model", "draft model that is nearly right")
NEARLY_RIGHT = KINDS[3]
MOST_APART = 1e-4  # of log-probabilities in float32
GPU_MEAN_APART = 0.05  # in bfloat16, up to where answers part; a faulty cache is apart by whole nats


def write_drafts(kind, strong_llama, folder):
    """A model and what drafts for it, as vLLM's speculative configuration."""
    model, drafts = strong_llama, {}
    if kind == "EAGLE3":
        drafts = {"method": "eagle3", "model": str(write_eagle3(model, folder))}
    elif kind == "MTP":
        model, drafts = write_mimo(folder), {"method": "mtp"}
    elif kind == NEARLY_RIGHT:
        drafts = {"method": "draft_model", "model": str(write_draft_model(model, folder, noise=0.02))}
    else:
        drafts = {"method": "draft_model", "model": str(write_own_draft_model(folder))}
    return str(model), {"speculative_config": drafts | {"num_speculative_tokens": NUM_DRAFTS}}


@pytest.fixture(scope="module", params=KINDS)
def answers(request, strong_llama, tmp_path_factory):
    """What both backends answer with one kind of drafts."""
    kind = request.param
    model, drafts = write_drafts(kind, strong_llama, tmp_path_factory.mktemp("drafts"))
    found = {}
    for backend in BACKENDS:
        lexico = {"codec": "exact"} if backend == "LEXICO" else {}
        case = model, backend, lexico, CHUNKS | drafts
        found[backend] = in_a_process(answer_with_drafts, *case, fault=kind == NEARLY_RIGHT)
    return kind, found


def apart(ours, theirs):
    """The largest distance of two lists of answers' log-probabilities."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_answers_are_vllms(answers):
    _, found = answers
    ours, theirs = (found[backend] for backend in ("LEXICO", "CPU_ATTN"))
    for one, other in ((ours, theirs), *((ours["long"], theirs["long"]) for _ in ours.keys() & {"long"})):
        assert one["tokens"] == other["tokens"]
        assert apart(one["logprobs"], other["logprobs"]) <= MOST_APART


def test_as_many_drafts_are_accepted(answers):
    kind, found = answers
    assert found["LEXICO"]["counts"] == found["CPU_ATTN"]["counts"]
    drafted, accepted = found["LEXICO"]["counts"]
    assert 0 < accepted < drafted and (accepted > drafted / 10 or kind != NEARLY_RIGHT)


def test_prefixes_are_found_as_without_codes(answers):
    _, found = answers
    hits = found["LEXICO"]["hits"]
    assert hits == found["CPU_ATTN"]["hits"]
    cold, continued = hits[: len(hits) // 2], hits[len(hits) // 2 :]
    assert cold == [0] * len(cold) and all(hit > length - 128 for hit, length in zip(continued, LENGTHS, strict=True))


def test_drafts_share_the_blocks_of_codes(answers):
    kind, found = answers
    codes, tail = found["LEXICO"]["groups"]
    drafts = {"draft model": 2, NEARLY_RIGHT: 4}.get(kind, 1)
    assert len(codes) == 4 + drafts and len(tail) == 4


def test_codes_of_rejected_drafts_are_seen_where_they_are_kept(answers):
    kind, found = answers
    if kind == NEARLY_RIGHT:
        assert apart(found["LEXICO"]["faulty"]["logprobs"], found["CPU_ATTN"]["long"]["logprobs"]) > 10 * MOST_APART


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, enforce_eager, strong_llama, tmp_path):
    """The V2 runner, whose drafts run in CUDA graphs of their own; bfloat16 parts answers where two tokens are tied."""
    model, drafts = write_drafts(kind, strong_llama, tmp_path)
    settings = CHUNKS | drafts | {"dtype": "bfloat16", "enforce_eager": enforce_eager, "max_num_seqs": 8}
    kept = {"FLASH_ATTN": {}, "LEXICO": {"codec": "exact"}}
    found = {name: in_a_process(answer_with_drafts, model, name, kept[name], settings, fault=False) for name in kept}
    gaps = []
    for one, other in zip(found["LEXICO"]["tokens"], found["FLASH_ATTN"]["tokens"], strict=True):
        gaps.append(
            next((place for place, pair in enumerate(zip(one, other, strict=True)) if len({*pair}) > 1), len(one))
        )
    rows = zip(found["LEXICO"]["logprobs"], found["FLASH_ATTN"]["logprobs"], gaps, strict=True)
    apart_by = [abs(a - b) for one, other, end in rows for a, b in zip(one[:end], other[:end], strict=True)]
    assert len(apart_by) >= 16 and sum(apart_by) / len(apart_by) <= GPU_MEAN_APART
    (drafted, accepted), (theirs, as_many) = (found[name]["counts"] for name in kept)
    assert abs(accepted / drafted - as_many / theirs) <= (0.1 if kind == NEARLY_RIGHT else 0.03)
    codes, tail = found["LEXICO"]["groups"]
    assert len(codes) > len(tail) == 4
