"""What the builders of a step of decode launch: each one kernel, and nothing that the host waits for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")
pytest.importorskip("triton")
from step_runner import Runner, Shape, recorded

from vllm_lexico.serve import decode_plan
from vllm_lexico.serve.coding_plan import max_coded_tokens

VIEWS = ("aten.slice.Tensor", "aten.select.int", "aten.view.default", "aten.alias.default", "aten.detach.default")
DECODES = [(1, 700), (1, 1023), (1, 31), (1, 2047)]


class Operations(TorchDispatchMode):
    """Collects the names of torch's operations that are more than views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if str(operation) not in VIEWS:
            self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def of_a_build(runner, shape, requests):
    """Operations of torch and kernels of the two builders, in a step that is not their first."""
    for builder, common in zip((runner.codes, runner.tail), runner.commons(requests), strict=True):
        builder.build(0, common)  # stacks the layers
    with recorded(shape) as kernels, torch.inference_mode():
        for builder, common in zip((runner.codes, runner.tail), runner.commons(requests), strict=True):
            with Operations() as seen:
                builder.build(0, common)
            yield seen.names, sorted(name for name, _ in kernels)


@pytest.mark.parametrize(
    "shape", [Shape(), Shape(drafts=3), Shape(prefix_hits="same")], ids=["plain", "drafts", "same"]
)
def test_builders_launch_one_kernel_each_when_all_requests_decode(base_config, shape):
    requests = [(1 + shape.drafts, done) for _, done in DECODES]
    launched = [*of_a_build(Runner(base_config, shape), shape, requests)]
    assert launched == [([], ["_plan_codes"]), ([], ["_plan_codes", "_plan_tail"])]


def test_operations_of_a_step_with_prefill_are_seen(base_config):
    (codes, _), (tail, kernels) = of_a_build(Runner(base_config, Shape()), Shape(), [*DECODES, (40, 0)])
    assert len(codes) > 50 and len(tail) > 25 and kernels == []


def test_what_is_planned_keeps_its_address(base_config):
    """CUDA graphs are replayed with it."""
    runner = Runner(base_config, Shape())
    addresses = set()
    for requests in (DECODES, DECODES[:1], [*DECODES, (40, 0)]):
        codes, tail = (
            builder.build(0, common)
            for builder, common in zip((runner.codes, runner.tail), runner.commons(requests), strict=True)
        )
        kept = codes.token_request, codes.token_seq_len, codes.destination, tail.source, tail.sink_end, tail.raw_start
        addresses.add(tuple(tensor.data_ptr() for tensor in kept))
    assert len(addresses) == 1


def test_mixed_and_pure_steps_plan_the_same_for_requests_that_decode(base_config):
    """A prompt beside them changes neither what they see nor what is coded of them."""
    requests = [(1, n) for n in range(1200, 1264)]
    found = []
    for prompt in ([], [(33, 0)]):
        runner = Runner(base_config, Shape(max_requests=80, max_model_len=2048))
        commons = runner.commons(requests + prompt)
        codes, tail = (b.build(0, common) for b, common in zip((runner.codes, runner.tail), commons, strict=True))
        count = len(requests)
        coded = (codes.destination >= 0) & (tail.source < 0)
        found.append(
            [codes.token_seq_len[:count], tail.raw_start[:count], codes.destination[coded], tail.source[coded]]
        )
    pure, mixed = found
    assert len(pure[2]) > 0
    for own, other in zip(pure, mixed, strict=True):
        assert torch.equal(own, other[: len(own)])


def test_buffers_have_room_for_a_padded_batch():
    buffers = decode_plan.PlanBuffers(64, 16, torch.device("cpu"))
    for tokens, requests in ((64, 16), (64, 1), (16, 16), (1, 1)):
        out = buffers.of_step(tokens, requests)
        assert len(out.token_request) == tokens and len(out.destination) == len(out.position) == len(out.request)
        assert len(out.position) == max_coded_tokens(tokens, requests)
    with pytest.raises(AssertionError, match="beyond buffers"):
        buffers.of_step(65, 16)
