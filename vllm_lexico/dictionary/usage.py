"""How evenly a dictionary uses its atoms: facts derived from the optional tensors `key_usage` and `value_usage`."""

import torch


def dead_atoms(usage: torch.Tensor) -> torch.Tensor:
    """int64 [layers]: atoms that were never chosen. usage: float32 [layers, N] shares; the null atom does not count."""
    return (usage[:, 1:] == 0).sum(1)


def effective_atoms(usage: torch.Tensor) -> torch.Tensor:
    """float32 [layers]: exp of the entropy of usage, float32 [layers, N] shares.

    It is the number of atoms that, all used alike, would carry as much information: N - 1 at best, 1 at worst.
    """
    return torch.special.entr(usage).sum(1).exp()
