"""The default codec's loss through the engine is the codec's own, in models with windows, learned sinks, large heads.

A random text is scored in chunks. What codes cost each of its tokens has to be what the same codec costs in
transformers, and is not where a fault is planted, or where a token's raw neighbours are others.
"""

import pytest

pytest.importorskip("vllm")
from coded_reading import CodedReading
from engines import make_tokens, score_a_prompt
from faults import FAULTS
from processes import in_a_process
from tiny_families import FAMILIES, write_checkpoint

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

CHUNK, TOKENS, LONGEST = 64, 500, 512  # the prompt of `score_a_prompt`
SETTINGS = {"dtype": "float32", "max_model_len": LONGEST, "max_num_batched_tokens": CHUNK}
TAIL = {"window": 64, "sinks": 32}
# Tokens of a page of codes, chosen so that a page of float32 has room for 32 raw tokens of a window's layers.
BLOCKS = {"Llama": 128, "Gemma 3": 1024, "gpt-oss": 256, "EXAONE 4": 256}
MOST_APART = 0.02  # of what the codes cost


@pytest.fixture(scope="module", params=BLOCKS)
def losses(request, load_benchmark, tmp_path_factory):
    """Scores of a text's tokens in the engine, with faults too, and in transformers; tokens of a block."""
    folder, name = tmp_path_factory.mktemp("loss"), request.param
    model = write_checkpoint(FAMILIES[name], folder / "model")
    written = load_benchmark("bench/shapes").write_random_dictionary(model, atoms=256)
    path = written.rename(folder / written.name)  # not beside the weights, for which vLLM would take it
    engine = in_a_process(score_a_prompt, str(model), "LEXICO", {"dictionary": str(path)} | TAIL, SETTINGS)
    settings = LexicoConfig.from_additional_config({"lexico": TAIL})
    tokens, block = make_tokens(0, TOKENS), BLOCKS[name]

    def outside(dictionary, chunk=CHUNK):
        return CodedReading(model, LONGEST, dictionary, settings, chunk, block).scores(tokens)

    tables = load_dictionary(path)
    return engine, {"plain": outside(None), "coded": outside(tables), "other chunks": outside(tables, 48)}, block


def mean_gap(ones, others):
    assert len(ones) == len(others) == TOKENS - 1
    return sum(abs(one - other) for one, other in zip(ones, others, strict=True)) / len(ones)


def test_the_loss_is_the_codecs_own(losses):
    engine, outside, _ = losses
    cost = mean_gap(outside["coded"], outside["plain"])
    apart = mean_gap(engine["scores"], outside["coded"])
    loss, own = (-sum(scores) / len(scores) for scores in (engine["scores"], outside["coded"]))
    print(f"the codes cost {cost:.4f} nats, the engine is {apart:.6f} away; losses {loss:.4f} and {own:.4f}")
    assert cost > 0.02 and apart <= MOST_APART * cost and abs(loss - own) <= MOST_APART * own


def test_other_losses_are_seen(losses):
    engine, outside, block = losses
    least = MOST_APART * mean_gap(outside["coded"], outside["plain"])
    others = engine["faults"] | {"other chunks": outside["other chunks"]}
    assert set(others) == {*FAULTS, "other chunks"}
    unseen = {name for name, scores in others.items() if mean_gap(scores, outside["coded"]) <= least}
    # A fault of decode alone, and one that needs two pages.
    assert unseen - {"another request's page"} == {"zeros"} and (len(unseen) == 1 or block > TOKENS)
