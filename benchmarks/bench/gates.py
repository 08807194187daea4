"""Gates: what predicts, from keys and values alone, how much attention a token will draw when its text is repeated.

After Fast KVzip (arXiv 2601.17668) and KVzap (2601.07891), which predict KVzip's score from hidden states. A cache sees
keys and values, so a layer's gate reads these: those of all KV heads, and for `mlp` the mean of the values of some
tokens before and after too, which coding that waits could look at. A gate learns a token's rank within its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, mse_loss

from bench.asked_model import History

NEIGHBOURS = 16  # tokens before, and as many after
HIDDEN = 64
BATCH = 1024
RATE = 3e-3
DECAY = 0.1  # of a network's weights, times the rate, per step
RIDGE = 1e-3

Gate = Callable[[History], Tensor]  # scores [layers, Hk, L] of a text


def features(history: History, neighbours: int = 0) -> Tensor:
    """What a gate reads: float32 [layers, L, F] of a text's keys and values [1, Hk, L, D]."""
    rows = []
    for key, value in history:
        own = [kv[0].transpose(0, 1).flatten(1).float() for kv in (key, value)]
        if neighbours:
            signal = own[1].T[None]
            pad = signal.new_zeros(1, signal.shape[1], neighbours)
            before = avg_pool1d(torch.cat((pad, signal[..., :-1]), 2), neighbours, 1)[..., : signal.shape[2]]
            after = avg_pool1d(torch.cat((signal[..., 1:], pad), 2), neighbours, 1)[..., : signal.shape[2]]
            own += [before[0].T, after[0].T]
        rows.append(torch.cat(own, 1))
    return torch.stack(rows)


def ranks(scores: Tensor) -> Tensor:
    """Place of each of [..., L] scores among them, -1/2 the lowest to 1/2."""
    return scores.argsort(-1).argsort(-1).float() / max(1, scores.shape[-1] - 1) - 0.5


class _Standard:
    """Features less their mean, over their deviation, as texts [texts][layers, L, F] have them."""

    def __init__(self, texts: Sequence[Tensor]) -> None:
        together = torch.cat(list(texts), 1)
        self.mean = together.mean(1, keepdim=True)
        self.deviation = together.std(1, keepdim=True).clamp(min=1e-6)

    def __call__(self, of_text: Tensor) -> Tensor:
        return ((of_text - self.mean) / self.deviation).clamp(-8, 8)


def linear_gate(texts: Sequence[History], scores: Sequence[Tensor], steps: int) -> Gate:
    """Ridge regression, a row of weights per layer and head.

    Args:
        texts: of training, not of what is measured.
        scores: [layers, Hk, L] of each.
        steps: for networks; not needed here.
    """
    seen = [features(history) for history in texts]
    standard = _Standard(seen)
    x = torch.cat([standard(of_text) for of_text in seen], 1)
    y = torch.cat([ranks(of_text).transpose(1, 2) for of_text in scores], 1)
    square = x.transpose(1, 2) @ x / x.shape[1]
    square += RIDGE * torch.eye(x.shape[2], device=x.device)
    weights = torch.linalg.solve(square, x.transpose(1, 2) @ y / x.shape[1])
    return lambda history: (standard(features(history)) @ weights).transpose(1, 2)


def mlp_gate(texts: Sequence[History], scores: Sequence[Tensor], steps: int) -> Gate:
    """A network with one hidden layer for each layer, in so many steps; other arguments as `linear_gate`."""
    seen = [features(history, NEIGHBOURS) for history in texts]
    standard = _Standard(seen)
    x = torch.cat([standard(of_text) for of_text in seen], 1)
    y = torch.cat([ranks(of_text).transpose(1, 2) for of_text in scores], 1)
    random = torch.Generator(x.device).manual_seed(0)
    layers, count, width = x.shape

    into = (torch.randn(layers, width, HIDDEN, generator=random, device=x.device) / width**0.5).requires_grad_()
    out = torch.zeros(layers, HIDDEN, y.shape[2], device=x.device, requires_grad=True)
    bias = torch.zeros(layers, 1, HIDDEN, device=x.device, requires_grad=True)

    def predict(given: Tensor) -> Tensor:
        return torch.nn.functional.gelu(torch.baddbmm(bias, given, into)) @ out

    learner = torch.optim.AdamW([into, out, bias], lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner, steps)
    for _ in range(steps):
        at = torch.randint(count, (min(BATCH, count),), generator=random, device=x.device)
        loss = mse_loss(predict(x[:, at]), y[:, at])
        learner.zero_grad()
        loss.backward()
        learner.step()
        schedule.step()

    @torch.no_grad()
    def gate(history: History) -> Tensor:
        return predict(standard(features(history, NEIGHBOURS))).transpose(1, 2)

    return gate


GATES = {"mlp": mlp_gate, "linear": linear_gate}


def recall(chosen: Tensor, wanted: Tensor) -> float:
    """Share of the wanted that are chosen too, both bool and equally many; 1 where none is wanted."""
    count = int(wanted.sum())
    return float((chosen & wanted).sum()) / count if count else 1.0
