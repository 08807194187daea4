"""Ways of running vLLM that are more than one engine and its requests: LEXICO answers as vLLM's CPU backend does.

With the exact codec, in float32; engines of one process, and new weights, with codes too. Sleep, which needs a GPU, is
in test_sleep.py.
"""

import pytest

pytest.importorskip("vllm")
from processes import in_a_process
from tiny_families import FAMILIES, write_checkpoint
from ways import ADAPTERS, SHARED, TOLD, WIPED, embed, run_data_parallel, run_two_engines, run_ways, write_adapters

GAP = 1e-4  # of log-probabilities in float32, and of a unit vector's numbers
EXACT = {"codec": "exact", "window": 0}
POOL_PAGES = 44  # so few that five requests cannot grow at once, and enough for what is asked for again
WAYS = ("adapters", "several", "structured", "beams", "scored", "priorities", "forgotten")
NEW = ("new weights", "old weights")


def same(ours, theirs):
    """Whether rows have equal tokens and log-probabilities."""
    assert len(ours) == len(theirs) > 0
    pairs = list(zip(ours, theirs, strict=True))
    if any(one["tokens"] != other["tokens"] for one, other in pairs):
        return False
    gaps = [abs(a - b) for one, other in pairs for a, b in zip(one["logprobs"], other["logprobs"], strict=True)]
    return max(gaps) <= GAP


@pytest.fixture(scope="module")
def run(strong_llama, other_llama, tmp_path_factory):
    """What each backend's engine says, see `run_ways`."""
    adapters = write_adapters(strong_llama, tmp_path_factory.mktemp("adapters"))
    cases = {"CPU_ATTN": ({}, None), "LEXICO": (EXACT, POOL_PAGES)}
    return {
        backend: in_a_process(run_ways, str(strong_llama), backend, lexico, adapters, other_llama, pool)
        for backend, (lexico, pool) in cases.items()
    }


@pytest.mark.parametrize("way", [*WAYS, *NEW])
def test_answers_are_those_of_cpu_attn(run, way):
    assert same(run["LEXICO"]["answers"]["whole"][way], run["CPU_ATTN"]["answers"]["whole"][way])


@pytest.mark.parametrize("way", WAYS)
def test_wiped_pages_are_seen(run, way):
    assert not same(run["LEXICO"]["answers"][WIPED][way], run["CPU_ATTN"]["answers"]["whole"][way])


def test_adapters_and_the_base_model_have_prefix_caches_of_their_own(run):
    whole = {backend: said["answers"]["whole"]["adapters"] for backend, said in run.items()}
    cached = [[row["cached"] for row in rows] for rows in whole.values()]
    assert cached[0] == cached[1] == [0] * 6 + [256, 512] * 3
    assert not same(run["LEXICO"]["answers"][SHARED]["adapters"], whole["CPU_ATTN"])


def test_a_router_is_told_whose_blocks_are_stored(run):
    expected = run["CPU_ATTN"]["events"]["whole"]
    assert {name for name, _ in expected} == {None, *ADAPTERS}
    assert run["LEXICO"]["events"]["whole"] == expected
    assert run["LEXICO"]["events"][TOLD] != expected


def test_requests_lost_their_pages_to_urgent_ones(run):
    assert run["LEXICO"]["preempted"] > 0


def test_new_weights_change_answers(run):
    whole = run["LEXICO"]["answers"]["whole"]
    assert not same(whole["new weights"], whole["forgotten"])
    assert same(whole["old weights"], whole["forgotten"])


@pytest.fixture(scope="module")
def engines(strong_llama, other_llama, strong_dictionary, load_benchmark, tmp_path_factory):
    """Two engines with codes in a process, twice, see `run_two_engines`."""
    written = load_benchmark("bench/shapes").write_random_dictionary(strong_llama, atoms=128)
    another = written.rename(tmp_path_factory.mktemp("another") / written.name)
    first = str(strong_llama), {"dictionary": str(strong_dictionary)}
    second = str(strong_llama), {"dictionary": str(another), "sparsity": 7}
    renewed = other_llama, first[1]
    cases = (first, second), (second, renewed)
    return [in_a_process(run_two_engines, *case, other_llama) for case in cases]


def test_engines_of_one_process_share_nothing(engines):
    one, other = engines
    assert same(one["first"], one["alone"]) and same(other["first"], other["alone"])
    assert same(one["second"], other["alone"])
    assert not same(one["first"], one["second"])  # the dictionaries and sparsities matter


def test_codes_after_new_weights_are_those_of_an_engine_that_started_with_them(engines):
    one, other = engines
    assert same(one["new"], other["second"]) and not same(one["new"], one["first"])
    assert not one["moved"]  # CUDA graphs know where codebooks are
    assert not same(one["lost"], one["new"])


def test_a_pooling_engine_gives_the_vectors_of_cpu_attn(strong_llama):
    cases = {"CPU_ATTN": {}, "LEXICO": EXACT}
    found = {backend: in_a_process(embed, str(strong_llama), backend, lexico) for backend, lexico in cases.items()}
    assert found["LEXICO"]["cached"][:3] == found["CPU_ATTN"]["cached"] == [[0], [0], [384]]

    def gap(ours):
        rows = zip(ours, found["CPU_ATTN"]["whole"], strict=True)
        return max(abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True))

    assert gap(found["LEXICO"]["whole"]) <= GAP < gap(found["LEXICO"][WIPED])


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return str(write_checkpoint(FAMILIES["Mixtral"], tmp_path_factory.mktemp("experts")))


@pytest.mark.parametrize("shared_out", [False, True])
def test_two_engines_in_data_parallel_step_together(experts, shared_out):
    theirs = in_a_process(run_data_parallel, experts, "CPU_ATTN", {}, shared_out)
    ours = in_a_process(run_data_parallel, experts, "LEXICO", EXACT, shared_out)
    for rank in range(2):
        assert same(ours[rank]["whole"], theirs[rank]["whole"]) and not same(ours[rank][WIPED], theirs[rank]["whole"])
