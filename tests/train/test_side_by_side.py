"""Several learners at a time on a CPU: the same outcome whatever the threads, and ended soon when interrupted."""

import threading
import time

import pytest
import torch

from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Set how many threads torch has."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def learned(count: int, threads) -> tuple[list[torch.Tensor], list[int]]:
    threads(count)
    told = []
    store = torch.randn(3, 2, 96, 2, 64, generator=torch.Generator().manual_seed(0))
    learners = LayerLearners([0, 1, 2], LearnSettings(atoms=16, sparsity=4, batch=64, shared=True), 0, "cpu")
    learners.learn(store, 2, 0, advance=told.append)
    lost = learners.held_out(store[:, :, :40])
    done = learners.finish(store, store[:, :, :40])
    assert torch.get_num_threads() == count
    return [*done.tensors.values(), *lost.values(), torch.tensor([*done.errors["key"]["7"]])], told


def test_threads_change_no_bit(threads):
    one, told = learned(1, threads)
    three, told_by_three = learned(3, threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert sum(told) == sum(told_by_three) == 3 * 2 * 2 * 192  # layers, K and V, passes, vectors


def test_results_come_in_the_order_of_the_items_and_at_once(threads):
    threads(3)
    meeting = threading.Barrier(3, timeout=60)

    def work(number):
        meeting.wait()  # of three threads: none gets on alone
        time.sleep(0.05 * (2 - number))
        assert torch.get_num_threads() == 1
        yield
        return number

    assert side_by_side(work, [(0,), (1,), (2,)], CPU) == [0, 1, 2]
    assert torch.get_num_threads() == 3


def test_a_failure_ends_the_others_soon(threads):
    threads(2)
    steps = [0, 0, 0]

    def work(number):
        for _ in range(10_000):
            steps[number] += 1
            time.sleep(0.01)
            yield
            if number == 1 and steps[1] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, [(0,), (1,), (2,)], CPU)
    assert max(steps) < 1000 and torch.get_num_threads() == 2
