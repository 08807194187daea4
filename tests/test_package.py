"""The package as it is installed: what it declares, what importing it costs, and the rules its files follow."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import vllm_lexico

MAX_LINES = 500
MAX_TRACKED_BYTES = 19 << 20
SOURCE_SUFFIXES = {".cu", ".md", ".py", ".toml"}


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    """Every file of the repository: tracked, or new and not ignored."""
    if not (root / ".git").exists():
        pytest.skip("needs a git checkout, to know which files belong to the repository")
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := root / name).is_file()]


def in_new_process(code: str) -> str:
    """Output of `code` in a fresh Python, as a user's process would run it."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version_is_that_of_the_distribution():
    assert metadata.version("vllm-lexico") == vllm_lexico.__version__


def test_vllm_finds_the_plugin_and_the_shell_the_command():
    [plugin] = metadata.entry_points(group="vllm.general_plugins", name="lexico")
    assert plugin.value == "vllm_lexico:register"
    assert plugin.load() is vllm_lexico.register
    [command] = metadata.entry_points(group="console_scripts", name="vllm-lexico")
    assert callable(command.load())


def test_installing_it_asks_for_no_other_vllm_torch_or_triton():
    needed = [line for line in metadata.requires("vllm-lexico") or [] if "extra ==" not in line]
    assert needed
    assert not [line for line in needed if line.startswith(("vllm", "torch", "triton"))]


def test_importing_it_loads_nothing_heavy():
    # vLLM imports every plugin in each of its processes, also where LEXICO is not used.
    code = "import json, sys, vllm_lexico; print(json.dumps([*{'torch', 'triton', 'vllm'} & {*sys.modules}]))"
    assert json.loads(in_new_process(code)) == []


def test_every_package_is_installed(root: Path):
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    sources = [(root, root / "vllm_lexico"), (root / "kernels", root / "kernels" / "lexico_kernels")]
    found = {
        ".".join(init.parent.relative_to(base).parts) for base, top in sources for init in top.rglob("__init__.py")
    }
    assert set(declared) == found | {"vllm_lexico.bundled"}


def test_every_cuda_source_is_installed(root: Path):
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    package = root / "kernels" / "lexico_kernels"
    installed = {path for pattern in declared["lexico_kernels"] for path in package.glob(pattern)}
    assert installed == {*package.rglob("*.cu")} != set()


def test_bundled_dictionaries_are_found():
    names = {entry.name for entry in resources.files("vllm_lexico.bundled").iterdir()}
    assert "README.md" in names
    assert any(name.endswith(".safetensors") for name in names)


def test_our_kernels_folder_hides_no_package_of_that_name(root: Path):
    # transformers probes `import kernels`. With the repository root on sys.path that would find our source folder.
    assert str(root) not in sys.path, "run pytest as `make test` does: PYTHONSAFEPATH=1 and --import-mode=importlib"
    spec = importlib.util.find_spec("kernels")
    locations = [] if spec is None else [*(spec.submodule_search_locations or [])]
    assert str(root / "kernels") not in locations


def test_files_stay_short(root: Path, files: list[Path]):
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix in SOURCE_SUFFIXES
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_files_that_are_imported_by_their_name_alone_have_names_of_their_own(root: Path, files: list[Path]):
    """Folders of tests and benchmarks are all on the path of one run, and of the processes that it starts."""
    tests, benchmarks = root / "tests", root / "benchmarks"
    folders = {path.parent for path in files if tests in path.parent.parents} | {benchmarks}
    helpers = [path.stem for path in files if path.parent in folders and path.suffix == ".py"]
    helpers = [name for name in helpers if not name.startswith(("test_", "conftest", "__"))]
    assert len(helpers) > 20 and sorted(set(helpers)) == sorted(helpers)


def test_the_repository_stays_small_enough_to_carry(files: list[Path]):
    assert sum(path.stat().st_size for path in files) < MAX_TRACKED_BYTES
