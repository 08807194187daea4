"""The picture of a dictionary: what each layer loses, and how evenly the atoms are used."""

from pathlib import Path
from typing import Any

import torch
from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.names import is_hub_id
from vllm_lexico.dictionary.usage import dead_atoms, effective_atoms

COLOURS = {"key": "#0072B2", "value": "#D55E00"}  # of Okabe and Ito, told apart by the colour-blind too
STYLES = ({"linestyle": "-", "marker": "o"}, {"linestyle": "--", "marker": "s"}, {"linestyle": ":", "marker": "^"})
DOTS_PER_INCH = 150
LEAST_USE = 1e-3  # of the mean; where the axis of use ends
LOOKS = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.wspace": 0.05,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
}


def plot_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Draw energy lost by layer and, where the file knows it, use of atoms, and write it to `path`, a .png.

    ValueError when matplotlib is missing, the file has neither of the two to show, or `path` names no kind of picture.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); run `pip install matplotlib`") from error
    losses, usage = bool(dictionary.info.errors), any(dictionary.usage(kv) is not None for kv in KV)
    if not losses and not usage:
        raise ValueError(f"the dictionary of {dictionary.info.model_name} holds neither losses nor usage to draw")
    with rc_context(LOOKS):
        figure = Figure(figsize=(12.4 if losses and usage else 7.4, 5.4), layout="constrained")
        axes = list(figure.subplots(1, losses + usage, squeeze=False)[0])
        if losses:
            _draw_losses(axes.pop(0), dictionary)
        if usage:
            _draw_usage(axes.pop(0), dictionary)
        info = dictionary.info
        name = info.model_name if is_hub_id(info.model_name) else Path(info.model_name).name
        made = f"{info.atoms:,} atoms of {info.atom_bits} bits per number, trained at {info.sparsity} atoms per vector"
        figure.suptitle(f"Dictionary of {name}\n{made}", fontsize=12.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_losses(axes: Any, dictionary: Dictionary) -> None:
    """A line per sparsity over the layers, for keys and for values, told apart by colour."""
    errors = dictionary.info.errors
    sparsities = sorted({int(sparsity) for of_kv in errors.values() for sparsity in of_kv})
    for kv, of_kv in errors.items():
        for sparsity, lost in sorted(of_kv.items(), key=lambda item: int(item[0])):
            axes.plot(
                dictionary.info.fingerprint.layers,
                [100 * share for share in lost],
                color=COLOURS[kv],
                markersize=4,
                linewidth=1.6,
                label=f"{kv}s, {sparsity} atoms per vector: {100 * sum(lost) / len(lost):.1f} %",
                **STYLES[sparsities.index(int(sparsity)) % len(STYLES)],
            )
    axes.set(title="Energy lost on held-out text", xlabel="layer", ylabel="share of the vectors' energy lost (%)")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "in the mean of the layers")


def _draw_usage(axes: Any, dictionary: Dictionary) -> None:
    """Atoms of a layer from the most to the least used; the line is the median layer, the band holds all of them."""
    atoms, most = 1, 1.0
    for kv in KV:
        usage = dictionary.usage(kv)
        if usage is None:
            continue
        atoms = usage.shape[1] - 1
        ranks = torch.arange(1, atoms + 1)
        # An atom that is never used would be at minus infinity; this way its line leaves through the bottom.
        times = (usage[:, 1:].sort(dim=1, descending=True).values * atoms).clamp(min=LEAST_USE / 1e6)
        label = f"{kv}s: {effective_atoms(usage).mean():,.0f} effective, {dead_atoms(usage).float().mean():,.1f} dead"
        axes.fill_between(ranks, times.amin(0), times.amax(0), color=COLOURS[kv], alpha=0.2, linewidth=0)
        axes.plot(ranks, times.median(0).values, color=COLOURS[kv], linewidth=1.8, label=label)
        most = max(most, times.max().item())
    axes.axhline(1, color="0.35", linewidth=1.2, linestyle=":", label="every atom used alike")
    axes.set(title="Use of atoms: median layer, and band of all layers", xlabel="atoms of a layer, most used first")
    axes.set(ylabel="times chosen, relative to the mean atom", yscale="log")
    axes.set(xlim=(0, 1.01 * atoms), ylim=(LEAST_USE, 2 * most))
    axes.yaxis.set_major_formatter(lambda times, _: f"{times:g}×")
    axes.xaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
    _finish(axes, "in the mean of the layers")


def _finish(axes: Any, legend: str) -> None:
    """The legend goes below, where it covers no line."""
    columns = len(axes.get_legend_handles_labels()[0]) // 3 or 1
    axes.legend(title=legend, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.13))
