"""The dictionaries of some layers: their learners, how a round goes, and the part of the file that they become."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lexico_kernels.memory.layout import KV
from safetensors.torch import load_file
from tqdm.auto import tqdm

from vllm_lexico.dictionary.atoms import pack_atoms, unit_atoms
from vllm_lexico.files import save_tensors
from vllm_lexico.train.learn import Learner, LearnSettings, count_usage, evaluate, round_atoms
from vllm_lexico.train.levels import Levels, learn_levels

LEVEL_VECTORS = {"cuda": 8192, "cpu": 1024}  # a part and layer, for the levels, by kind of device
REPORTED_SPARSITIES = (7, 15)
USAGE_SPARSITY = 15
LAYERS_AT_ONCE = {"cuda": 8, "cpu": 1}  # K and V of each: enough vectors a launch to keep a GPU busy
LEAST_RATE = 0.02  # of the rate, at the end of annealing
REVIVALS = 4  # a round
LEAST_QUERY_ENERGY = 1e-3  # of the mean number's: what keeps stretches finite where queries are silent


@dataclass(frozen=True)
class FinishedLayers:
    """What some layers add to the file: tensors by name, first axis layers, and errors by part and sparsity."""

    tensors: dict[str, torch.Tensor]
    errors: dict[str, dict[str, list[float]]]
    rounds: int  # that it took

    def write(self, target: Path) -> None:
        """target.safetensors and target.json; the latter is written last and says that both are complete."""
        save_tensors(target.with_suffix(".safetensors"), self.tensors)
        target.with_suffix(".json").write_text(json.dumps({"errors": self.errors, "rounds": self.rounds}))


def key_stretch(queries: torch.Tensor, power: float) -> torch.Tensor:
    """What keys are divided by, float32 [layers, Hk, D] of geometric mean 1: small where queries are large.

    queries: energy of the queries that a head's keys meet, number by number. With power 1 an error of the divided key
    is an error of q.k, were numbers of a query independent; rotary embedding makes them so for tokens far apart.
    """
    energy = queries / queries.mean(-1, keepdim=True) + LEAST_QUERY_ENERGY
    stretch = energy.pow(-power / 2)
    return stretch / stretch.log().mean(-1, keepdim=True).exp()


class LayerLearners:
    """Learners of K and V of some layers, a few layers a learner.

    Dictionary (2 l + part) * copies + head of a learner belongs to layer l and its head; copies is the KV heads, or 1
    where they share.
    """

    def __init__(self, layers: list[int], settings: LearnSettings, seed: int, device: str) -> None:
        self.layers, self.settings, self.device = layers, settings, torch.device(device)
        self.seed = seed + 2 * layers[0]  # with a group's first row added, the same however devices share the layers
        self.copies = 1
        self.learners: list[Learner] = []
        self.mean = torch.zeros(0)  # float32 [layers * 2, Hk, D]
        self.stretch = torch.zeros(0)  # the same, see `Codebook`
        self.scale = torch.zeros(0)  # float32 [layers * 2], root of a vector's mean energy
        self.losses: list[float] = []  # held-out, mean of all, by round

    def learn(
        self,
        store: torch.Tensor,
        passes: int,
        number: int,
        *,
        cooling: tuple[float, float] | None = None,
        queries: torch.Tensor | None = None,
        quiet: bool = False,
    ) -> None:
        """One round over captured vectors [layers, 2, tokens, Hk, D], each seen `passes` times.

        cooling: which stretch of annealing this round is, (0, 1) for all of it: the rate falls to nothing over the
        whole, and codes are the stored ones. None: the full rate. queries: float32 [layers, Hk, D], energy of what
        keys will meet, for the first round; without it keys are not stretched.
        """
        if not self.learners:
            self._start(store, queries)
        rows = self._rows(store)
        batch = min(self.settings.batch, rows)
        steps = passes * (rows // batch)
        with tqdm(
            total=len(self.layers) * steps, desc=f"round {number + 1}", unit="step", mininterval=1.0, disable=quiet
        ) as progress:
            for learner, kv in self._groups():
                generator = torch.Generator(self.device).manual_seed(self.seed + 7919 * number + kv.start)
                levels = None
                for step in range(steps):
                    at = step % (rows // batch)
                    if at == 0:
                        order = torch.randperm(rows, generator=generator, device=self.device)
                    vectors = self._vectors(store, kv, order[at * batch : (at + 1) * batch])
                    rate = self.settings.rate
                    if cooling is not None:
                        rate *= max(1 - cooling[0] - (cooling[1] - cooling[0]) * step / steps, LEAST_RATE)
                        if step % max(1, steps // 4) == 0:
                            levels = self._levels(store, learner, kv, (self.settings.sparsity,))
                    residual = learner.step(vectors, rate, levels)
                    if cooling is None and (step + 1) % max(1, steps // REVIVALS) == 0:
                        learner.revive(residual)
                    progress.update((kv.stop - kv.start) // 2)

    def held_out(self, store: torch.Tensor) -> dict[int, torch.Tensor]:
        """Energy lost of other vectors, by sparsity, float32 [layers, 2]; the mean is remembered."""
        lost: dict[int, list[torch.Tensor]] = {sparsity: [] for sparsity in REPORTED_SPARSITIES}
        for learner, kv in self._groups():
            vectors = self._vectors(store, kv, self._sample(store))
            atoms = self._stored_atoms(learner)
            levels = learn_levels(vectors, atoms, REPORTED_SPARSITIES, sharing=self.copies)
            for sparsity, values in self._evaluate(vectors, atoms, levels).items():
                lost[sparsity].append(values)
        tables = {sparsity: torch.cat(values).view(-1, 2).cpu() for sparsity, values in lost.items()}
        self.losses.append(float(torch.stack([table.mean() for table in tables.values()]).mean()))
        return tables

    def settled(self, least_gain: float) -> bool:
        """Whether the last round took less than this share off the error of the round before."""
        return len(self.losses) > 1 and self.losses[-1] > self.losses[-2] * (1 - least_gain)

    def finish(self, store: torch.Tensor, held_out: torch.Tensor) -> FinishedLayers:
        """The layers' part of the file. store: training vectors, for the levels. held_out: others, for the errors."""
        tensors: dict[str, list[torch.Tensor]] = {}
        losses: dict[int, list[torch.Tensor]] = {sparsity: [] for sparsity in REPORTED_SPARSITIES}
        for learner, kv in self._groups():
            integers = round_atoms(learner.atoms, self.settings.atom_bits)
            atoms = self._stored_atoms(learner)
            samples = self._vectors(store, kv, self._sample(store))
            levels = learn_levels(samples, atoms, sharing=self.copies)
            others = self._vectors(held_out, kv, torch.arange(self._rows(held_out), device=self.device))
            for sparsity, values in self._evaluate(others, atoms, levels).items():
                losses[sparsity].append(values)
            made = {
                "atoms": self._by_head(pack_atoms(integers, self.settings.atom_bits)),
                "mean": self.mean[kv],
                "stretch": self.stretch[kv],
                "levels": levels.table[:: self.copies],
                "usage": self._by_head(count_usage(others, atoms, USAGE_SPARSITY) / self.copies).half(),
            }
            for kind, tensor in made.items():
                for at, name in enumerate(KV):
                    tensors.setdefault(f"{name}_{kind}", []).append(tensor[at::2].cpu())
        tables = {str(sparsity): torch.cat(values).view(-1, 2).tolist() for sparsity, values in losses.items()}
        errors = {
            kv: {sparsity: [round(row[at], 5) for row in table] for sparsity, table in tables.items()}
            for at, kv in enumerate(KV)
        }
        joined = {name: torch.cat(parts).contiguous() for name, parts in tensors.items()}
        return FinishedLayers(joined, errors, rounds=len(self.losses))

    def _evaluate(self, vectors: torch.Tensor, atoms: torch.Tensor, levels: Levels) -> dict[int, torch.Tensor]:
        """Energy lost by sparsity, float32 [layers * 2]: of all heads together."""
        weight = vectors.square().sum((1, 2)).view(-1, self.copies)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-20)
        lost = evaluate(vectors, atoms, levels, REPORTED_SPARSITIES)
        return {sparsity: (values.view_as(weight) * weight).sum(1) for sparsity, values in lost.items()}

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """[dictionaries, ...] as the file has it: [layers * 2, Hk, ...], or without Hk where heads share."""
        return tensor if self.settings.shared else tensor.unflatten(0, (-1, self.copies))

    def save(self, path: Path, rounds_done: int) -> None:
        """Keep everything that `load` needs to go on after this round."""
        tensors = {name: getattr(self, name).cpu() for name in ("mean", "stretch", "scale")}
        tensors["losses"] = torch.tensor(self.losses)
        tensors["rounds_done"] = torch.tensor(rounds_done)
        for at, learner in enumerate(self.learners):
            tensors |= {f"{at}.{name}": tensor.contiguous() for name, tensor in learner.state().items()}
        save_tensors(path, tensors)

    def load(self, path: Path) -> int:
        """Go on from a saved state; returns the rounds that are done."""
        tensors = load_file(str(path))
        for name in ("mean", "stretch", "scale"):
            setattr(self, name, tensors[name].to(self.device))
        self.losses = tensors["losses"].tolist()
        self._make_learners()
        for at, learner in enumerate(self.learners):
            learner.load_state({name: tensors[f"{at}.{name}"] for name in (*Learner.STATE, "steps")})
        return int(tensors["rounds_done"])

    def _start(self, store: torch.Tensor, queries: torch.Tensor | None) -> None:
        self.mean = torch.stack([vectors.float().mean(0) for vectors in store.flatten(0, 1)])
        self.stretch = torch.ones_like(self.mean)
        if queries is not None:
            self.stretch[::2] = key_stretch(queries.to(self.device), self.settings.key_metric)
        energies = [
            ((vectors.float() - mean) / stretch).square().sum(-1).mean()
            for vectors, mean, stretch in zip(store.flatten(0, 1), self.mean, self.stretch, strict=True)
        ]
        self.scale = torch.stack(energies).sqrt().clamp(min=1e-20)
        self._make_learners()
        rows = self._rows(store)
        for learner, kv in self._groups():
            generator = torch.Generator(self.device).manual_seed(self.seed + kv.start)
            some = torch.randperm(rows, generator=generator, device=self.device)[: 4 * self.settings.atoms]
            learner.start_from(self._vectors(store, kv, some), generator)

    def _make_learners(self) -> None:
        heads, dim = self.mean.shape[1:]
        self.copies = 1 if self.settings.shared else heads
        at_once = max(1, LAYERS_AT_ONCE[self.device.type] // self.copies)
        sizes = [len(self.layers[first : first + at_once]) for first in range(0, len(self.layers), at_once)]
        self.learners = [Learner(self.settings, 2 * size * self.copies, dim, self.device) for size in sizes]

    def _groups(self) -> Iterator[tuple[Learner, slice]]:
        """Each learner with its rows of the store, layers and parts flattened."""
        first = 0
        for learner in self.learners:
            rows = len(learner.atoms) // self.copies
            yield learner, slice(first, first + rows)
            first += rows

    def _rows(self, store: torch.Tensor) -> int:
        """What a dictionary learns from: tokens, times heads where they share it."""
        return store.shape[2] * store.shape[3] // self.copies

    def _vectors(self, store: torch.Tensor, kv: slice, rows: torch.Tensor) -> torch.Tensor:
        """float32 [dictionaries, M, D]: these rows, see `_rows`, centred, stretched and of about unit energy."""
        own, rows = store.flatten(0, 1)[kv], rows.to(store.device)
        mean, stretch = self.mean[kv], self.stretch[kv]
        if self.settings.shared:
            head = rows % store.shape[3]
            vectors = own.flatten(1, 2).index_select(1, rows).to(self.device, torch.float32)
            vectors = vectors.sub_(mean.index_select(1, head)).div_(stretch.index_select(1, head))
        else:
            vectors = own.index_select(1, rows).to(self.device, torch.float32)
            vectors = vectors.sub_(mean[:, None]).div_(stretch[:, None])
        vectors /= self.scale[kv].view(-1, *[1] * (vectors.ndim - 1))
        return vectors if self.settings.shared else vectors.transpose(1, 2).flatten(0, 1)

    def _sample(self, store: torch.Tensor) -> torch.Tensor:
        """Rows for the levels: all heads of tokens spread evenly."""
        tokens, heads = store.shape[2:4]
        stride = max(1, tokens * heads // self.copies // LEVEL_VECTORS[self.device.type])
        spread = torch.arange(0, tokens, stride, device=self.device)
        together = heads // self.copies
        return (spread[:, None] * together + torch.arange(together, device=self.device)).flatten()

    def _levels(self, store: torch.Tensor, learner: Learner, kv: slice, sparsities: tuple[int, ...]) -> Levels:
        vectors = self._vectors(store, kv, self._sample(store))
        return learn_levels(vectors, self._stored_atoms(learner), sparsities, sharing=self.copies)

    def _stored_atoms(self, learner: Learner) -> torch.Tensor:
        """Atoms as serving will have them."""
        atoms = unit_atoms(round_atoms(learner.atoms, self.settings.atom_bits))
        return atoms.bfloat16() if atoms.is_cuda else atoms
