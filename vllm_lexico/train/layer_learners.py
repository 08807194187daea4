"""The dictionaries of some layers: their learners, how a round goes, and the part of the file that they become.

Everything here has the axes [layers, 2, heads, ...], 2 for keys and values. `flat` is where they become the one axis
[G, ...] of dictionaries that learn side by side, which `learn` and `levels` work on, and `LayerLearners.named` is the
way back.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock

import torch
from lexico_kernels.memory.layout import KV
from torch.nn.functional import normalize

from vllm_lexico.dictionary.atoms import pack_atoms, unit_atoms
from vllm_lexico.train.capture import check_finite
from vllm_lexico.train.learn import Learner, LearnSettings, count_usage, evaluate, round_atoms
from vllm_lexico.train.levels import Levels, learn_levels
from vllm_lexico.train.side_by_side import side_by_side

LEVEL_VECTORS = {"cuda": 8192, "cpu": 512}  # per layer, for keys and for values each, by kind of device
EVALUATED_VECTORS = {"cuda": 1 << 20, "cpu": 1024}  # the same, of those held out, at the end
REPORTED_SPARSITIES = (7, 15)  # 1/16 and 1/8 of heads of 128
LARGE_HEADS_REPORTED = (15, 31)  # the same of heads of 256
LARGE_HEAD = 256
USAGE_SPARSITY = 15
LAYERS_AT_ONCE = {"cuda": 8, "cpu": 1}  # K and V of each: enough vectors per launch to keep a GPU busy
LEAST_RATE = 0.02  # of the rate, at the end of annealing
REVIVALS = 4  # per round
Finishing = Generator[None, None, tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]]
LEAST_QUERY_ENERGY = 1e-3  # of the mean number's: what keeps stretches finite where queries are silent


@dataclass(frozen=True)
class Parent:
    """A dictionary that is adapted: some layers of it.

    Args:
        atoms: float32 [layers, 2, heads, N, D], unit rows, row 0 null; one head where they share.
        stretch: float32 [layers, 2, Hk, D], which keys and values were divided by when these were learned.
    """

    atoms: torch.Tensor
    stretch: torch.Tensor

    def atoms_at(self, stretch: torch.Tensor, layers: slice, shared: bool) -> torch.Tensor:
        """The atoms of some layers as they are where vectors are divided by another stretch; unit rows, row 0 null.

        Heads that share their atoms have one stretch for them, the geometric mean.
        """
        ratio = (self.stretch[layers].to(stretch) / stretch[layers]).log()
        ratio = (ratio.mean(2, keepdim=True) if shared else ratio).exp()
        return normalize(self.atoms[layers].to(stretch) * ratio[:, :, :, None], dim=-1)


@dataclass(frozen=True)
class FinishedLayers:
    """What some layers add to the file.

    Args:
        tensors: by name, first axis layers.
        errors: energy lost by layer, by kv and sparsity.
        rounds: that it took.
    """

    tensors: dict[str, torch.Tensor]
    errors: dict[str, dict[str, list[float]]]
    rounds: int


def key_stretch(queries: torch.Tensor, power: float) -> torch.Tensor:
    """What keys are divided by: small where queries are large.

    Args:
        queries: [layers, Hk, D], energy of the queries that a head's keys meet, number by number.
        power: 0 for no stretch; with 1 an error of the divided key is an error of q.k, were numbers of a query
            independent; rotary embedding makes them so for tokens far apart.

    Returns:
        float32 [layers, Hk, D] of geometric mean 1.
    """
    energy = queries / queries.mean(-1, keepdim=True) + LEAST_QUERY_ENERGY
    stretch = energy.pow(-power / 2)
    return stretch / stretch.log().mean(-1, keepdim=True).exp()


def layers_at_once(kind: str, copies: int) -> int:
    """Layers that learn together, with the random numbers of their first.

    Args:
        kind: of device.
        copies: heads of a layer that have atoms of their own.
    """
    return max(1, LAYERS_AT_ONCE[kind] // copies)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[layers, 2, heads, ...] -> [G, ...]."""
    return tensor.flatten(0, 2)


class LayerLearners:
    """Learners of K and V of some layers, a few layers per learner.

    Args:
        layers: the model's numbers of them; rows of a store are these.
        settings: how atoms are learned.
        seed: of everything random.
        device: where learning happens.
        parent: what is adapted, of these layers; None to start from training vectors.
        first: how many of the coded layers come before these; None for the first one's number.
    """

    STATE = ("mean", "stretch", "scale")

    def __init__(
        self,
        layers: list[int],
        settings: LearnSettings,
        seed: int,
        device: str,
        *,
        first: int | None = None,
        parent: Parent | None = None,
    ) -> None:
        self.layers, self.settings, self.device = layers, settings, torch.device(device)
        first = layers[0] if first is None else first
        self.seed = seed + 2 * first  # with a group's first row added, the same however devices share the layers
        self.parent = parent
        self.copies = 1  # heads that have atoms of their own: Hk, or 1 where they share
        self.learners: list[Learner] = []
        self.mean = torch.zeros(0)  # float32 [layers, 2, Hk, D]
        self.stretch = torch.zeros(0)  # the same, see `Codebook`
        self.scale = torch.zeros(0)  # float32 [layers, 2], root of a vector's mean energy
        self.losses: list[float] = []  # held-out, mean of all, by round

    def learn(
        self,
        store: torch.Tensor,
        passes: int,
        number: int,
        *,
        cooling: tuple[float, float] | None = None,
        queries: torch.Tensor | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """One round over captured vectors.

        Args:
            store: [layers, 2, tokens, Hk, D].
            passes: how often each vector is seen.
            number: of the round.
            cooling: which stretch of annealing this round is, (0, 1) for all of it: the rate falls to nothing over the
                whole, and codes are the stored ones. None: the full rate.
            queries: float32 [layers, Hk, D], energy of what keys will meet, for the first round; without it keys are
                not stretched.
            advance: told of the codes that were made since the last call.

        Raises:
            ValueError: a layer's vectors are too large to be learned from.
        """
        if not self.learners:
            self._start(store, queries)
        rows = self._rows(store)
        steps = passes * (rows // min(self.settings.batch, rows))
        codes, lock = min(self.settings.batch, rows) * len(KV) * self.copies, Lock()

        def learn_one(learner: Learner, layers: slice) -> Generator[None, None, None]:
            for _ in self._steps(learner, layers, store, steps, number, cooling):
                if advance is not None:
                    with lock:
                        advance(codes * (layers.stop - layers.start))
                yield

        side_by_side(learn_one, list(self._groups()), self.device)

    def _steps(
        self,
        learner: Learner,
        layers: slice,
        store: torch.Tensor,
        steps: int,
        number: int,
        cooling: tuple[float, float] | None,
    ) -> Iterator[None]:
        """A learner's steps of a round."""
        rows = self._rows(store)
        batch = min(self.settings.batch, rows)
        generator = torch.Generator(self.device).manual_seed(self.seed + 7919 * number + 2 * layers.start)
        levels = None
        for step in range(steps):
            at = step % (rows // batch)
            if at == 0:
                order = torch.randperm(rows, generator=generator, device=self.device)
            vectors = self._vectors(store, layers, order[at * batch : (at + 1) * batch])
            rate = self.settings.rate
            if cooling is not None:
                rate *= max(1 - cooling[0] - (cooling[1] - cooling[0]) * step / steps, LEAST_RATE)
                if step % max(1, steps // 4) == 0:
                    levels = self._levels(store, learner, layers, (self.settings.sparsity,))
            residual = learner.step(vectors, rate, levels)
            if cooling is None and (step + 1) % max(1, steps // REVIVALS) == 0:
                learner.revive(residual)
            yield

    def held_out(self, store: torch.Tensor) -> dict[int, torch.Tensor]:
        """Energy lost of other vectors, by sparsity, float32 [layers, 2]; the mean is remembered.

        Raises:
            ValueError: a layer has learned numbers that are none.
        """
        for learner, layers in self._groups():
            self._check(self.named(learner.atoms), "atoms", layers)

        def lose(learner: Learner, layers: slice) -> Generator[None, None, dict[int, torch.Tensor]]:
            vectors = self._vectors(store, layers, self._sample(store))
            atoms = self._stored_atoms(learner)
            levels = learn_levels(vectors, atoms, self._reported(), sharing=self.copies)
            yield
            return self._evaluate(vectors, atoms, levels)

        lost = side_by_side(lose, list(self._groups()), self.device)
        tables = {sparsity: torch.cat([own[sparsity] for own in lost]).cpu() for sparsity in self._reported()}
        self.losses.append(float(torch.stack([table.mean() for table in tables.values()]).mean()))
        return tables

    def settled(self, least_gain: float) -> bool:
        """Whether the last round took less than this share off the error of the round before."""
        return len(self.losses) > 1 and self.losses[-1] > self.losses[-2] * (1 - least_gain)

    def finish(self, store: torch.Tensor, held_out: torch.Tensor) -> FinishedLayers:
        """The layers' part of the file.

        Args:
            store: training vectors [layers, 2, tokens, Hk, D], for the levels.
            held_out: others, for the errors.
        """
        done = side_by_side(
            lambda learner, layers: self._finish(learner, layers, store, held_out), list(self._groups()), self.device
        )
        tensors = {
            f"{kv}_{kind}": torch.cat([kinds[kind][:, at].cpu() for kinds, _ in done]).contiguous()
            for kind in done[0][0]
            for at, kv in enumerate(KV)
        }
        tables = {str(sparsity): torch.cat([lost[sparsity] for _, lost in done]).tolist() for sparsity in done[0][1]}
        errors = {
            kv: {sparsity: [round(row[at], 5) for row in table] for sparsity, table in tables.items()}
            for at, kv in enumerate(KV)
        }
        return FinishedLayers(tensors, errors, rounds=len(self.losses))

    def _finish(self, learner: Learner, layers: slice, store: torch.Tensor, held_out: torch.Tensor) -> Finishing:
        """A learner's part of the file, by kind [layers, 2, ...], and the energy lost by sparsity, [layers, 2]."""
        atoms = self._stored_atoms(learner)
        levels = learn_levels(self._vectors(store, layers, self._sample(store)), atoms, sharing=self.copies)
        yield
        others = self._vectors(held_out, layers, self._sample(held_out, EVALUATED_VECTORS))
        lost = self._evaluate(others, atoms, levels)
        yield
        integers = round_atoms(learner.atoms, self.settings.atom_bits)
        usage = count_usage(others, atoms, USAGE_SPARSITY) / self.copies
        return {
            "atoms": self._by_head(self.named(pack_atoms(integers, self.settings.atom_bits))),
            "mean": self.mean[layers],
            "stretch": self.stretch[layers],
            "levels": self.named(levels.table)[:, :, 0],
            "usage": self._by_head(self.named(usage)).half(),
        }, lost

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` needs to go on after this round, on the CPU."""
        tensors = {name: getattr(self, name).cpu() for name in self.STATE}
        tensors["losses"] = torch.tensor(self.losses)
        for at, learner in enumerate(self.learners):
            tensors |= {f"{at}.{name}": tensor.contiguous() for name, tensor in learner.state().items()}
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on where `state` was taken."""
        for name in self.STATE:
            setattr(self, name, tensors[name].to(self.device))
        self.losses = tensors["losses"].tolist()
        self._make_learners()
        for at, learner in enumerate(self.learners):
            learner.load_state({name: tensors[f"{at}.{name}"] for name in (*Learner.STATE, "steps")})

    def named(self, tensor: torch.Tensor) -> torch.Tensor:
        """[G, ...] -> [layers, 2, heads, ...]; one head where they share."""
        return tensor.unflatten(0, (-1, len(KV), self.copies))

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """[layers, 2, heads, ...] as the file has it: without the axis of heads where they share."""
        return tensor[:, :, 0] if self.settings.shared else tensor

    def _reported(self) -> tuple[int, ...]:
        """Sparsities at which losses are told."""
        return LARGE_HEADS_REPORTED if self.mean.shape[-1] >= LARGE_HEAD else REPORTED_SPARSITIES

    def _evaluate(self, vectors: torch.Tensor, atoms: torch.Tensor, levels: Levels) -> dict[int, torch.Tensor]:
        """Energy lost by sparsity, float32 [layers, 2]: of all heads together."""
        weight = self.named(vectors.square().sum((1, 2)))
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        lost = evaluate(vectors, atoms, levels, self._reported())
        return {sparsity: (self.named(values) * weight).sum(-1) for sparsity, values in lost.items()}

    def _check(self, tensor: torch.Tensor, name: str, layers: slice = slice(None)) -> None:
        """ValueError where numbers [layers, 2, ...] of these layers are not finite, with the layer."""
        for row, layer in enumerate(self.layers[layers]):
            for at, kv in enumerate(KV):
                check_finite(tensor[row, at], layer, f"{kv} {name}")

    def _start(self, store: torch.Tensor, queries: torch.Tensor | None) -> None:
        axes = store.shape[:2]
        self.mean = torch.stack([vectors.float().mean(0) for vectors in store.flatten(0, 1)]).unflatten(0, axes)
        self.stretch = torch.ones_like(self.mean)
        if queries is not None:
            self.stretch[:, 0] = key_stretch(queries.to(self.device), self.settings.key_metric)
        energies = [
            ((own.float() - mean) / stretch).square().sum(-1).mean()
            for rows in zip(store, self.mean, self.stretch, strict=True)
            for own, mean, stretch in zip(*rows, strict=True)
        ]
        self.scale = torch.stack(energies).sqrt().clamp(min=1e-20).unflatten(0, axes)
        for name in self.STATE:
            self._check(getattr(self, name), f"{name}s")
        self._make_learners()
        rows = self._rows(store)
        for learner, layers in self._groups():
            generator = torch.Generator(self.device).manual_seed(self.seed + 2 * layers.start)
            some = torch.randperm(rows, generator=generator, device=self.device)[: 4 * self.settings.atoms]
            learner.start_from(self._vectors(store, layers, some), generator)
            if self.parent is not None:
                learner.atoms = flat(self.parent.atoms_at(self.stretch, layers, self.settings.shared))

    def _make_learners(self) -> None:
        heads, dim = self.mean.shape[2:]
        self.copies = 1 if self.settings.shared else heads
        at_once = layers_at_once(self.device.type, self.copies)
        sizes = [len(self.layers[first : first + at_once]) for first in range(0, len(self.layers), at_once)]
        self.learners = [Learner(self.settings, size * len(KV) * self.copies, dim, self.device) for size in sizes]

    def _groups(self) -> Iterator[tuple[Learner, slice]]:
        """Each learner with its layers, as rows of the store."""
        first = 0
        for learner in self.learners:
            count = len(self.named(learner.atoms))
            yield learner, slice(first, first + count)
            first += count

    def _rows(self, store: torch.Tensor) -> int:
        """What a dictionary learns from: tokens, times heads where they share it."""
        return store.shape[2] * store.shape[3] // self.copies

    def _vectors(self, store: torch.Tensor, layers: slice, rows: torch.Tensor) -> torch.Tensor:
        """float32 [G, M, D]: these rows, see `_rows`, centred, stretched and of about unit energy."""
        own, rows = store[layers], rows.to(store.device)
        mean, stretch, scale = self.mean[layers], self.stretch[layers], self.scale[layers, :, None, None]
        if self.settings.shared:
            head = rows % store.shape[3]
            vectors = own.flatten(2, 3).index_select(2, rows).to(self.device, torch.float32)
            vectors = vectors.sub_(mean.index_select(2, head)).div_(stretch.index_select(2, head)).div_(scale)
            return flat(vectors[:, :, None])
        vectors = own.index_select(2, rows).to(self.device, torch.float32)
        vectors = vectors.sub_(mean[:, :, None]).div_(stretch[:, :, None]).div_(scale[..., None])
        return flat(vectors.transpose(2, 3))

    def _sample(self, store: torch.Tensor, most: Mapping[str, int] = LEVEL_VECTORS) -> torch.Tensor:
        """About so many rows, by kind of device: all heads of tokens spread evenly."""
        tokens, heads = store.shape[2:4]
        stride = max(1, tokens * heads // self.copies // most[self.device.type])
        spread = torch.arange(0, tokens, stride, device=self.device)
        together = heads // self.copies
        return (spread[:, None] * together + torch.arange(together, device=self.device)).flatten()

    def _levels(self, store: torch.Tensor, learner: Learner, layers: slice, sparsities: tuple[int, ...]) -> Levels:
        vectors = self._vectors(store, layers, self._sample(store))
        return learn_levels(vectors, self._stored_atoms(learner), sparsities, sharing=self.copies)

    def _stored_atoms(self, learner: Learner) -> torch.Tensor:
        """Atoms as serving will have them."""
        atoms = unit_atoms(round_atoms(learner.atoms, self.settings.atom_bits))
        return atoms.bfloat16() if atoms.is_cuda else atoms
