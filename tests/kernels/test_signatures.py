"""Wrappers of kernels and public operations have their twins' signatures; and no kernel has many parameters."""

import ast
import inspect
from pathlib import Path

import lexico_kernels
import pytest
from lexico_kernels import ops, reconstruct, reference, write_tail
from lexico_kernels.omp_encode import all_layers, clusters, pursuit, tiles
from lexico_kernels.sparse_decode import lookup, portable

WRAPPERS = {
    "write_tail": (ops, write_tail),
    "omp_encode": (ops, tiles, clusters),
    "omp_encode_layers": (ops, all_layers, clusters),
    "pursue": (ops, pursuit),
    "sparse_decode": (ops, portable, lookup),
    "reconstruct": (ops, reconstruct),
}
# Settings that only the dispatch in `ops` gives: which of two launches codes.
OWN = {"omp_encode_layers": {"fewer", "most"}}
MOST_PARAMETERS = 16


@pytest.mark.parametrize(("name", "module"), [(name, module) for name in WRAPPERS for module in WRAPPERS[name]])
def test_wrappers_have_the_twins_signature(name, module):
    twin, wrapper = inspect.signature(getattr(reference, name)), inspect.signature(getattr(module, name))
    own = {} if module is ops else OWN.get(name, {})
    assert [p for p in wrapper.parameters.values() if p.name not in own] == [*twin.parameters.values()]
    assert wrapper.return_annotation == twin.return_annotation
    for extra in wrapper.parameters.keys() - twin.parameters.keys():
        assert wrapper.parameters[extra].kind is inspect.Parameter.KEYWORD_ONLY
        assert wrapper.parameters[extra].default is not inspect.Parameter.empty


def test_no_operation_is_forgotten():
    """An operation is what both `reference` and `ops` define under one name."""
    public = [name for name, found in vars(ops).items() if inspect.isfunction(found) and hasattr(reference, name)]
    assert sorted(public) == sorted(WRAPPERS)


def kernels():
    """Every function of the package that Triton compiles, with its number of parameters."""
    for path in sorted(Path(lexico_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield path.stem, node.name, len(node.args.args)


def test_kernels_have_few_parameters():
    found = [*kernels()]
    assert len(found) > 20
    assert [kernel for kernel in found if kernel[2] > MOST_PARAMETERS] == []
