"""Fixtures that the tests share: models to run, and tests that need a GPU left out where there is none."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Read by vLLM when an engine starts: a small cache (GiB) and no warm-up keep its start short on a CPU.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
# By itself vLLM ties its threads to the cores that it counts as its own: beside another busy process it takes twice as
# long, since the two share one core while another idles.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smollm2", metavar="DIR", help="a SmolLM2-135M-Instruct checkpoint, instead of fetching one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """Load a file of benchmarks/ by its name; the folder is no package and stays off sys.path."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name.replace('/', '_')}", ROOT / "benchmarks" / f"{name}.py"
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` no file grows beyond 1000 bytes, which is reported as a full disk is.

    It is for the lines that write and no others: where its output goes to a file, pytest could not report.
    """
    resource = pytest.importorskip("resource")

    @contextmanager
    def full() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For shapes so small that threads only wait for each other, very long when the machine is shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def import_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Import a file of benchmarks/ that imports its neighbours; the folder is on sys.path for one module of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="session")
def write_letters_model(load_benchmark: Callable[[str], ModuleType]) -> Callable[..., Path]:
    """Write a random Llama of heads of 16, two queries a KV head, and a tokenizer that knows single letters."""
    return load_benchmark("bench/letters_model").write_letters_model


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """A checkpoint of SmolLM2-135M-Instruct: the quickstart's, fetched by the same command."""
    if given := pytestconfig.getoption("--smollm2"):
        return Path(given)
    command = [sys.executable, str(ROOT / "examples" / "get_model.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"SmolLM2-135M-Instruct could not be fetched:\n{result.stderr}", pytrace=False)
    return Path(result.stdout.strip())


@pytest.fixture(scope="session")
def strong_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with random weights so large that attention decides its answers, and a letters' tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("strong-llama")
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,  # three query heads per KV head: a group that is no power of two
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = {chr(code): code - 29 for code in range(32, 127)} | {"?": 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def strong_dictionary(strong_llama, load_benchmark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of random atoms for `strong_llama`, not beside its weights, which vLLM would take it for."""
    written = load_benchmark("bench/shapes").write_random_dictionary(strong_llama, atoms=256)
    return written.rename(tmp_path_factory.mktemp("dictionary") / written.name)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers without weights or tokenizer, for `load_format="dummy"` and `skip_tokenizer_init=True`."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 384,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "num_attention_heads": 6,  # three query heads a KV head: a group that is no power of two
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "vocab_size": 512,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
