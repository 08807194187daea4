"""What `vllm-lexico inspect` shows: facts, the table, and the picture; with and without use of atoms and matplotlib."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_lexico import cli
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.picture import plot_dictionary
from vllm_lexico.dictionary.usage import dead_atoms, effective_atoms


@pytest.fixture(scope="module")
def bundled(root) -> Dictionary:
    """A dictionary as files were before there was usage in them."""
    dictionary = load_dictionary(root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors")
    return Dictionary(dictionary.info, {name: t for name, t in dictionary.tensors.items() if "usage" not in name})


@pytest.fixture(scope="module")
def with_usage(bundled) -> Dictionary:
    layers, atoms = bundled.info.fingerprint.num_layers, bundled.info.atoms
    usage = torch.zeros(layers, atoms)
    usage[:, 1:1025] = 1 / 1024  # used alike, and the rest of 2047 never
    return Dictionary(bundled.info, bundled.tensors | {"key_usage": usage.half(), "value_usage": usage.half()})


def pixels(path: Path) -> tuple[int, int]:
    """Width and height as the PNG's header has them."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_usage_by_hand():
    usage = torch.tensor([[0.0, 0.5, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    assert dead_atoms(usage).tolist() == [0, 2]
    assert effective_atoms(usage).tolist() == pytest.approx([2 * math.sqrt(2), 1.0])


def test_usage_is_kept_in_the_file_and_checked(with_usage, bundled, tmp_path):
    with_usage.save(tmp_path / "d.safetensors")
    read = load_dictionary(tmp_path / "d.safetensors")
    assert torch.equal(read.usage("value"), with_usage.usage("value")) and bundled.usage("key") is None
    with pytest.raises(ValueError, match=r"key_usage is float32 \(30, 5\), its metadata asks for float16 \(30, 2048"):
        Dictionary(bundled.info, bundled.tensors | {"key_usage": torch.zeros(30, 5)})


def test_inspect_prints_and_draws(with_usage, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "d.safetensors"
    with_usage.save(path)
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr()
    assert "keys       use 1024 atoms effectively" in shown.out and "30690 of 61410 atoms are dead" in shown.out
    assert "value dead" in shown.out and f"picture: {path.with_suffix('.png')}" in shown.out and not shown.err
    wide, high = pixels(path.with_suffix(".png"))
    assert cli.main(["inspect", str(path), "--plot", str(tmp_path / "new" / "a.png")]) == 0
    assert pixels(tmp_path / "new" / "a.png") == (wide, high)


def test_a_picture_that_cannot_be_written_is_refused_before_the_table(with_usage, tmp_path, capsys):
    path = tmp_path / "some.safetensors"
    with_usage.save(path)
    for picture, words in (
        ("a.xyz", "allowed: a file that ends with .png, .pdf, .svg or .jpg"),
        (str(path / "a.png"), "allowed: a place that can be written to"),
    ):
        assert cli.main(["inspect", str(path), "--plot", picture]) == 2
        shown = capsys.readouterr()
        assert "--plot was given as" in shown.err and words in shown.err and not shown.out


def test_inspect_prints_what_is_asked_by_layer(with_usage, tmp_path, capsys):
    layers, heads = with_usage.info.fingerprint.num_layers, with_usage.info.fingerprint.num_kv_heads
    shares = torch.full((layers, heads), 0.25)
    shares[3] = torch.linspace(0.5, 0.75, heads)
    path = tmp_path / "d.safetensors"
    Dictionary(with_usage.info, with_usage.tensors | {"asked_shares": shares}).save(path)
    assert cli.main(["inspect", str(path), "--no-plot"]) == 0
    rows = {row.split()[0]: row.split()[-1] for row in capsys.readouterr().out.splitlines() if row.strip()}
    assert (rows["layer"], rows["2"], rows["3"]) == ("asked", "0.2500", "0.6250")
    assert rows["mean"] == f"{(0.25 * (layers - 1) + 0.625) / layers:.4f}"


def test_no_plot(bundled, tmp_path, capsys):
    bundled.save(tmp_path / "d.safetensors")
    assert cli.main(["inspect", str(tmp_path / "d.safetensors"), "--no-plot"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
    shown = capsys.readouterr().out
    assert "key 15" in shown and "dead" not in shown and "picture" not in shown


def test_a_picture_needs_something_to_show(bundled, with_usage, tmp_path):
    pytest.importorskip("matplotlib")
    plot_dictionary(bundled, tmp_path / "losses.png")
    plot_dictionary(Dictionary(replace(bundled.info, errors={}), with_usage.tensors), tmp_path / "usage.png")
    plot_dictionary(with_usage, tmp_path / "both.png")
    assert pixels(tmp_path / "losses.png") == pixels(tmp_path / "usage.png")
    assert pixels(tmp_path / "both.png")[0] > pixels(tmp_path / "losses.png")[0]
    with pytest.raises(ValueError, match="neither losses nor usage"):
        plot_dictionary(Dictionary(replace(bundled.info, errors={}), bundled.tensors), tmp_path / "none.png")


def test_without_matplotlib_the_table_still_comes(bundled, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "d.safetensors"
    bundled.save(path)
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr()
    assert " mean " in shown.out and "no picture: drawing needs matplotlib" in shown.err
    assert "pip install matplotlib" in shown.err
    assert cli.main(["inspect", str(path), "--plot", str(tmp_path / "a.png")]) == 2
    assert "error: drawing needs matplotlib" in capsys.readouterr().err
