"""Drafts by a model: with the exact codec LEXICO answers, and accepts drafts, as vLLM's own backend does.

Tiny checkpoints with strong random weights in float32: heads of EAGLE, EAGLE3 and DFlash, a MiMo that predicts a token
more, a draft model of a shape of its own and one that is right now and then. On a GPU they run in bfloat16.
"""

import pytest

pytest.importorskip("vllm")
from draft_answers import (
    LENGTHS,
    NUM_DRAFTS,
    answer_with_drafts,
    write_dflash,
    write_draft_model,
    write_eagle,
    write_eagle3,
    write_mimo,
    write_own_draft_model,
    write_qwen3_next,
)
from engines import on_this_device
from faults import REJECTED_KEPT
from processes import in_a_process

from vllm_lexico.serve.tail_pages import TAIL_SUFFIX

CHUNKS = {"max_model_len": 2048, "max_num_batched_tokens": 256, "enable_prefix_caching": True, "block_size": 64}
BACKENDS = ("CPU_ATTN", "LEXICO")
KINDS = ("EAGLE", "EAGLE3", "MTP", "DFlash", "draft model", "draft model that is nearly right")
NEARLY_RIGHT = KINDS[5]
BESIDE_STATES = "MTP beside states"
MOST_APART = 1e-4  # of log-probabilities in float32
BFLOAT16_MEAN_APART = 0.05  # up to where answers part; a faulty cache is apart by whole nats


def write_drafts(kind, strong_llama, folder):
    """A model and what drafts for it, as vLLM's speculative configuration."""
    model, drafts = strong_llama, {}
    if kind == "EAGLE":
        drafts = {"method": "eagle", "model": str(write_eagle(model, folder))}
    elif kind == "DFlash":
        drafts = {"method": "dflash", "model": str(write_dflash(model, folder))}
    elif kind == "EAGLE3":
        drafts = {"method": "eagle3", "model": str(write_eagle3(model, folder))}
    elif kind == "MTP":
        model, drafts = write_mimo(folder), {"method": "mtp"}
    elif kind == BESIDE_STATES:
        model, drafts = write_qwen3_next(folder), {"method": "mtp"}
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
        found[backend] = in_a_process(answer_with_drafts, *case, fault=REJECTED_KEPT if kind == NEARLY_RIGHT else None)
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
    drafts = {"DFlash": 2, "draft model": 2, NEARLY_RIGHT: 4}.get(kind, 1)
    assert len(codes) == 4 + drafts and len(tail) == 4


def test_codes_of_rejected_drafts_are_seen_where_they_are_kept(answers):
    kind, found = answers
    if kind == NEARLY_RIGHT:
        assert apart(found["LEXICO"]["faulty"]["logprobs"], found["CPU_ATTN"]["long"]["logprobs"]) > 10 * MOST_APART


def compare_in_bfloat16(kind, theirs, strong_llama, folder, settings, fault=None):
    """Answers part where two tokens are tied; up to there log-probabilities are near, and as many drafts accepted.

    Whether any two are tied depends on how the machine's CPU rounds; where none are, drafts are accepted alike.
    """
    model, drafts = write_drafts(kind, strong_llama, folder)
    kept = {theirs: {}, "LEXICO": {"codec": "exact"}}
    found = {
        name: in_a_process(answer_with_drafts, model, name, kept[name], settings | drafts, fault=fault) for name in kept
    }
    ends = []
    for one, other in zip(found["LEXICO"]["tokens"], found[theirs]["tokens"], strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        ends.append(next((place for place, pair in pairs if len({*pair}) > 1), len(one)))
    rows = zip(found["LEXICO"]["logprobs"], found[theirs]["logprobs"], ends, strict=True)
    apart_by = [abs(a - b) for one, other, end in rows for a, b in zip(one[:end], other[:end], strict=True)]
    assert len(apart_by) >= 16 and sum(apart_by) / len(apart_by) <= BFLOAT16_MEAN_APART
    if all(end == len(one) for end, one in zip(ends, found[theirs]["tokens"], strict=True)):
        assert found["LEXICO"]["counts"] == found[theirs]["counts"]
    shares = [accepted / drafted for drafted, accepted in (one["counts"] for one in found.values())]
    assert abs(shares[0] - shares[1]) <= (0.1 if kind == NEARLY_RIGHT else 0.03)
    (tail,) = [group for group in found["LEXICO"]["groups"] if group[0].endswith(TAIL_SUFFIX)]
    (codes,) = [group for group in found["LEXICO"]["groups"] if tail[0].removesuffix(TAIL_SUFFIX) in group]
    assert len(codes) > len(tail) == (2 if kind == BESIDE_STATES else 4)
    return found


def test_states_are_kept_beside_drafts(strong_llama, tmp_path):
    """Without a prefix cache: the CPU build of vLLM 0.32 copies states with a kernel of Triton there."""
    settings = CHUNKS | {"block_size": None, "dtype": "bfloat16", "enable_prefix_caching": False}
    found = compare_in_bfloat16(BESIDE_STATES, "CPU_ATTN", strong_llama, tmp_path, settings, "wiped pages")
    faulty, sound = (found["LEXICO"][name]["logprobs"] for name in ("faulty", "long"))
    assert apart(faulty, sound) > 10 * BFLOAT16_MEAN_APART


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, BESIDE_STATES])
def test_on_a_gpu(kind, enforce_eager, strong_llama, tmp_path):
    """The V2 runner, whose drafts run in CUDA graphs of their own."""
    settings = CHUNKS | on_this_device() | {"enforce_eager": enforce_eager, "max_num_seqs": 8}
    if kind == BESIDE_STATES:
        settings |= {"block_size": None, "gdn_prefill_backend": "triton"}
    found = compare_in_bfloat16(kind, "FLASH_ATTN", strong_llama, tmp_path, settings)
    ours, theirs = (found[name]["hits"][-1] for name in ("LEXICO", "FLASH_ATTN"))
    assert (ours > 0) == (theirs > 0)  # of the longest prompt, continued
