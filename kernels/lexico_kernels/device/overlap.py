"""Kernels that start before the kernel before them on the stream has ended ("programmatic dependent launch").

Between ordinary launches a GPU drains: the next kernel starts when all of the one before has ended and can be read. A
kernel launched with the attribute for it starts as soon as every block of the one before has ended or called
`trigger_next`, and finds what earlier kernels wrote after `wait_for_previous`. CUDA graphs keep this as edges of their
own kind. An ordinary launch that follows still waits for all.

The rule that makes it safe, also where a layer's kernels follow the last layer's on the same scratch: a kernel that is
launched so waits in every program, before it reads what any kernel of an engine's step writes and before it writes
anything; it triggers only after that. So it has ended only when all before it have, and at any time no more than two
kernels run, of which the later one waits. What is read before the wait, dictionaries alone, no step writes.
"""

from functools import cache as once

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from lexico_kernels.device import launch


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until all kernels before have ended and what they wrote can be read, where this one starts before."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def trigger_next(OVERLAP: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have come here or ended."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@once
def supports(device: int) -> bool:
    """Whether kernels are compiled for a GPU that has it; in Triton's interpreter they are not."""
    if torch.version.cuda is None or not isinstance(wait_for_previous, JITFunction):
        return False
    if not hasattr(tl.extra.cuda, "gdc_wait"):  # an older Triton, which has no such launches either
        return False
    return torch.cuda.get_device_capability(device) >= launch.OVERLAP_CAPABILITY


def overlap_on(tensor: Tensor) -> bool:
    """Whether kernels on a tensor's device start before the one before has ended: if `launch.OVERLAP`, and it can."""
    return launch.OVERLAP and tensor.is_cuda and supports(tensor.device.index)


def launch_options(overlap: bool) -> dict[str, bool]:
    """Options of a launch in Triton; none of an ordinary one, since not every backend knows them."""
    return {"launch_pdl": True} if overlap else {}
