"""One engine with real codes in the smallest pool: hits with their window, KV events, and input in pieces."""

import asyncio
import socket

import pytest

pytest.importorskip("vllm")
import msgspec
import zmq
from engines import make_tokens
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

MAX_MODEL_LEN, BLOCK = 700, 128
# 6 of codes; 1 of sinks and 18 for two windows, each of 128 + 128 tokens in pages of 32; the null page
POOL_PAGES = 6 + 1 + 18 + 1
PROMPT = make_tokens(0, 640)
SECONDS = 300


async def ask(llm, name, prompt, max_tokens):
    """Ask; returns tokens of the cache that were used and the answer's tokens."""
    tokens, cached = [], 0
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    async with asyncio.timeout(SECONDS):
        async for output in llm.generate(prompt, params, name):
            tokens += output.outputs[0].token_ids
            cached = output.num_cached_tokens or cached
    return cached, tokens


async def pieces():
    """Four pieces of 150 tokens, as a client sends them."""
    for piece in range(4):
        yield StreamingInput({"prompt_token_ids": PROMPT[piece * 150 : piece * 150 + 150]})


async def drive(model, dictionary, port):
    """All requests, one after the other; returns what `ask` does, by name."""
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"tcp://*:{port}")
    args = AsyncEngineArgs(
        str(model),
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK,
        num_gpu_blocks_override=POOL_PAGES,
        enforce_eager=True,
        skip_tokenizer_init=True,
        attention_backend="LEXICO",
        dtype="bfloat16",
        additional_config={"lexico": {"prefix_hits": "window", "dictionary": str(dictionary)}},
        kv_events_config=events,
    )
    llm = AsyncLLM.from_engine_args(args)
    try:
        seen = {"first": await ask(llm, "first", {"prompt_token_ids": PROMPT}, 20)}
        seen["again"] = await ask(llm, "again", {"prompt_token_ids": PROMPT}, 20)
        turn = PROMPT + seen["again"][1] + PROMPT[:20]
        seen["next turn"] = await ask(llm, "next turn", {"prompt_token_ids": turn}, 5)
        seen["pieces"] = await ask(llm, "pieces", pieces(), 10)
        await asyncio.sleep(1)  # the last events are on their way
        return seen
    finally:
        llm.shutdown()


@pytest.fixture(scope="module")
def run(strong_llama, strong_dictionary):
    """What requests saw, and the batches of events that a router was sent with their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with zmq.Context() as context, context.socket(zmq.SUB) as router:
        router.connect(f"tcp://127.0.0.1:{port}")
        router.subscribe("")
        seen = asyncio.run(drive(strong_llama, strong_dictionary, port))
        batches = []
        while router.poll(1000):
            _, number, batch = router.recv_multipart()
            batches.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(batch, type=KVEventBatch)))
    return seen, batches


def test_the_same_prompt_again_hits(run):
    seen, _ = run
    assert seen["first"][0] == 0 and seen["again"][0] == 512  # the last whole block that leaves a token to compute
    assert len(seen["again"][1]) == 20


def test_the_next_turn_of_a_conversation_hits(run):
    seen, _ = run
    assert seen["next turn"][0] == 512


def test_input_in_pieces_is_answered(run):
    seen, _ = run
    assert len(seen["pieces"][1]) == 40


def test_a_router_can_follow_the_events(run):
    _, batches = run
    assert [number for number, _ in batches] == list(range(len(batches))) and batches
    stored = []
    for _, batch in batches:
        for event in batch.events:
            assert event.group_idx == 0
            if isinstance(event, BlockStored):
                assert event.block_size == BLOCK and len(event.token_ids) == BLOCK * len(event.block_hashes) > 0
                assert event.parent_block_hash is None or event.parent_block_hash in stored
                stored += event.block_hashes
            else:
                for each in event.block_hashes:
                    stored.remove(each)
    assert len(stored) >= 600 // BLOCK  # at least what the last request left
