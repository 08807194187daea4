"""The table of bundled dictionaries: what the command writes, from files and rows alone."""

import json

import pytest


@pytest.fixture(scope="module")
def table(import_benchmark):
    return import_benchmark("dictionary_table")


def test_the_page_has_the_table_that_is_written(table, root):
    page = (root / "dictionaries" / "README.md").read_text(encoding="utf-8")
    made = table.make_table(root / "dictionaries", root / "benchmarks" / "results")
    assert table.replaced(page, made, table.START, table.END) == page, "run python benchmarks/dictionary_table.py"
    assert len(made.splitlines()) == 2 + len(list((root / "dictionaries").glob("*.safetensors")))


def test_a_line_says_what_the_file_and_the_newest_rows_say(table, make_dictionary, tmp_path):
    made = make_dictionary()
    made.info.errors.update(key={"15": [0.1, 0.3]}, value={"15": [0.25, 0.5]})
    made.save(tmp_path / "d.safetensors")
    case = {"text": "wikitext", "gains": [0.5, 1.0], "dictionary": "d.safetensors", "sparsity": 15}
    study = case | {"dictionary": "bundled", "dictionary_facts": {"file": "d.safetensors"}}
    rows = [
        {"metric": "perplexity_ratio", "case": case, "value": 1.5},
        {"metric": "perplexity_ratio", "case": case, "value": 1.25},
        {"metric": "perplexity_ratio", "case": case | {"dictionary": "e.safetensors"}, "value": 3.0},
        {"metric": "perplexity_ratio", "case": case | {"text": "code"}, "value": 4.0},
        {"metric": "perplexity_ratio", "case": case | {"gains": None}, "value": 6.0},  # of codes that nobody is served
        {"metric": "energy_lost", "case": case, "value": 5.0},
    ]
    of_study = {"metric": "perplexity_ratio", "case": study | {"sparsity": {"key": 7.0, "value": 7.0}}, "value": 1.75}
    unlike = of_study | {"case": study | {"sparsity": {"key": 15.0, "value": 7.0}}, "value": 8.0}
    (tmp_path / "quality.jsonl").write_text("\n".join(map(json.dumps, (of_study, unlike))))
    (tmp_path / "dictionary.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = table.make_table(tmp_path, tmp_path).splitlines()[2]
    assert line.endswith("| 0.2000, 0.3750 | 1.250, 1.750 |")
    assert line.startswith("| d.safetensors, ") and f"| {made.info.model_name} |" in line
