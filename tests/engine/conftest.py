"""What the tests of whole engines share is found by its neighbours' names, as the processes that they start find it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def other_llama(strong_llama, tmp_path_factory):
    """The shape of `strong_llama` with other weights."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("other-llama")
    LlamaForCausalLM(AutoConfig.from_pretrained(strong_llama)).save_pretrained(folder)
    return str(folder)
