"""Learning on the CPU: a learner's step, rounding, levels, what a dictionary loses, and the learners of some layers."""

import pytest
import torch
from lexico_kernels import Codebook, CodeLayout, reference
from lexico_kernels.ops import pursue
from torch.nn.functional import normalize

from vllm_lexico.dictionary.atoms import unit_atoms, unpack_atoms
from vllm_lexico.train import layer_learners, learn
from vllm_lexico.train.layer_learners import LayerLearners, key_stretch
from vllm_lexico.train.learn import Learner, LearnSettings, count_usage, evaluate, round_atoms
from vllm_lexico.train.levels import LEARNED_SPARSITIES, Levels, learn_levels
from vllm_lexico.train.settings import share_layers


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_atoms(groups: int, size: int, dim: int, seed: int = 0) -> torch.Tensor:
    atoms = normalize(torch.randn(groups, size, dim, generator=seeded(seed)), dim=-1)
    atoms[:, 0] = 0
    return atoms


def rebuild(atoms: torch.Tensor, indices: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    chosen = torch.stack([book[own.long()] for book, own in zip(atoms, indices, strict=True)])
    return torch.einsum("gms,gmsd->gmd", coefficients, chosen)


def sparse_vectors(atoms: torch.Tensor, rows: int, sparsity: int) -> torch.Tensor:
    groups, size, _ = atoms.shape
    indices = torch.rand(groups, rows, size - 1, generator=seeded(1)).argsort(-1)[..., :sparsity] + 1
    return rebuild(atoms, indices, torch.randn(groups, rows, sparsity, generator=seeded(2)) / sparsity**0.5)


def share_lost(vectors: torch.Tensor, residual: torch.Tensor) -> float:
    return float(residual.square().sum() / vectors.square().sum())


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_planted_dictionaries_are_found(atom_bits):
    hidden = random_atoms(2, 32, 16)
    vectors = sparse_vectors(hidden, 2300, 3)
    settings = LearnSettings(atoms=32, atom_bits=atom_bits, sparsity=3, batch=256)
    learner = Learner(settings, 2, 16, "cpu")
    learner.start_from(vectors[:, :256], seeded(3))
    assert not learner.atoms[:, 0].any()
    for step in range(160):
        residual = learner.step(vectors[:, step % 8 * 256 :][:, :256], settings.rate)
        if step % 40 == 39:
            learner.revive(residual)
    for step in range(40):
        levels = learn_levels(vectors[:, :256], unit_atoms(round_atoms(learner.atoms, atom_bits)), (3,))
        learner.step(vectors[:, step % 8 * 256 :][:, :256], settings.rate * (1 - step / 40), levels)
    integers = round_atoms(learner.atoms, atom_bits)
    assert integers.dtype == torch.int8 and integers.abs().max() <= 2 ** (atom_bits - 1) - 1
    assert not integers[:, 0].any() and integers[:, 1:].any(-1).all()

    def lost(atoms: torch.Tensor) -> float:
        return float(evaluate(vectors[:, 2048:], atoms, learn_levels(vectors[:, :500], atoms, (3,)), [3])[3].mean())

    assert lost(unit_atoms(integers)) < 0.6 * lost(random_atoms(2, 32, 16, seed=9))


def test_two_steps_by_hand():
    learner = Learner(LearnSettings(atoms=3, sparsity=1), 1, 2, "cpu")
    learner.atoms = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    # 2 of the first atom, which leaves (0, 0.5), and 1 of the second, which leaves nothing.
    residual = learner.step(torch.tensor([[[2.0, 0.5], [0.0, 1.0]]]), rate=0.5)
    torch.testing.assert_close(residual, torch.tensor([[[0.0, 0.5], [0.0, 0.0]]]))
    floor = 1e-3 * (2 + 0.5) / 3
    moved = normalize(torch.tensor([1.0, 0.5 * 0.5 / (2 + floor)]), dim=0)  # gradient 2 * 0.5 / 2, energy 2 * 2 / 2
    torch.testing.assert_close(learner.atoms[0], torch.stack((torch.zeros(2), moved, torch.tensor([0.0, 1.0]))))
    assert learner.usage.tolist() == [[0, 1, 1]]

    # Three times the first atom: no gradient is added to what 0.7 is kept of, and 9 to what 0.9 is kept of.
    learner.step((3 * moved).expand(1, 2, 2), rate=0.5)
    momentum, energy = 0.7 * torch.tensor([0.0, 0.5]), 0.9 * 2 + 0.1 * 9
    floor = 1e-3 * (energy + 0.9 * 0.5) / 3
    again = normalize(moved + 0.5 * momentum / (energy + floor), dim=0)
    torch.testing.assert_close(learner.atoms[0, 1], again)
    assert learner.usage.tolist() == [[0, 3, 1]] and learner.steps == 2


def test_an_atom_that_a_vector_has_twice_counts_with_the_sum(monkeypatch):
    once, twice = (Learner(LearnSettings(atoms=4, sparsity=3), 1, 8, "cpu") for _ in range(2))
    once.atoms = twice.atoms = random_atoms(1, 4, 8)
    residual = torch.randn(1, 1, 8, generator=seeded(10))
    for learner, indices, coefficients in ((once, [2, 3, 0], [2, 1, 0]), (twice, [2, 3, 2], [0.5, 1, 1.5])):
        code = torch.tensor([[indices]], dtype=torch.int32), torch.tensor([[coefficients]]).float(), residual
        monkeypatch.setattr(learn, "pursue", lambda *_, code=code: code)
        learner.step(residual, 0.5)
    assert torch.equal(once.momentum, twice.momentum)
    assert once.energy.tolist() == [[0, 0, 4, 1]] and twice.energy.tolist() == [[0, 0, 2.5, 1]]  # entries count alone


def test_annealed_steps_code_as_stored_and_move_what_is_not_rounded(monkeypatch):
    learner = Learner(LearnSettings(atoms=24, atom_bits=4, sparsity=3), 2, 16, "cpu")
    vectors = torch.randn(2, 64, 16, generator=seeded(4)) / 4
    learner.start_from(vectors, seeded(5))
    before, stored = learner.atoms.clone(), unit_atoms(round_atoms(learner.atoms, 4))
    levels = learn_levels(vectors, stored, (3,))
    asked = []
    monkeypatch.setattr(learn, "pursue", lambda *args: asked.append(args) or pursue(*args))
    residual = learner.step(vectors, 1e-3, levels)
    assert torch.equal(asked[0][1], stored) and torch.equal(asked[0][3], levels.of(3))
    assert torch.equal(residual, pursue(vectors, stored, 3, levels.of(3))[2])
    moved = (learner.atoms - before).norm(dim=-1)[:, 1:]
    assert (moved > 0).any() and moved.max() < 1e-2 < (learner.atoms - stored).norm(dim=-1)[:, 1:].min()
    learner.step(vectors, 1e-3)
    assert not torch.equal(asked[1][1], unit_atoms(round_atoms(learner.atoms, 4))) and asked[1][3] is None


def test_dead_atoms_are_revived_and_the_null_atom_never():
    learner = Learner(LearnSettings(atoms=6, sparsity=1), 2, 8, "cpu")
    learner.atoms = random_atoms(2, 6, 8)
    learner.momentum += 1
    learner.usage = torch.tensor([[0, 9, 9, 0, 9, 9], [0, 9, 9, 9, 9, 0.1]])
    learner.energy = torch.arange(12.0).view(2, 6)
    before, residual = learner.atoms.clone(), torch.randn(2, 5, 8, generator=seeded(6))
    residual[:, 3] *= 100  # coded worst
    assert learner.revive(residual) == 2
    changed = (learner.atoms != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 3], [1, 5]]
    for group, atom in ((0, 3), (1, 5)):
        torch.testing.assert_close(learner.atoms[group, atom], normalize(residual[group, 3], dim=0))
        assert not learner.momentum[group, atom].any() and learner.energy[group, atom] == (2.5, 8.5)[group]
    assert not learner.atoms[:, 0].any() and not learner.usage.any()
    learner.usage[:] = 1
    learner.usage[:, 0] = 0
    assert learner.revive(residual) == 0


@pytest.mark.parametrize(("atom_bits", "least"), [(4, 0.985), (8, 0.9999)])
def test_rounding_keeps_directions(atom_bits, least):
    atoms = random_atoms(1, 64, 64)
    integers = round_atoms(atoms, atom_bits)
    assert integers.dtype == torch.int8 and integers.abs().max() <= 2 ** (atom_bits - 1) - 1
    assert (unit_atoms(integers) * atoms).sum(-1)[:, 1:].min() > least
    assert not integers[:, 0].any()


def test_levels_ascend_and_serve_every_sparsity():
    atoms = random_atoms(2, 64, 32)
    vectors = torch.randn(2, 300, 32, generator=seeded(7))
    table = learn_levels(vectors, atoms).table
    assert table.shape == (2, 32, 16) and table.dtype == torch.float32 and table.abs().max() <= 1
    assert not table[:, 0].any() and table[:, 1:].any(-1).all() and (table.diff(dim=-1) >= 0).all()
    for between, below, above in ((6, 5, 7), (17, 15, 19), (18, 15, 19), (30, 27, 31)):
        assert between not in LEARNED_SPARSITIES
        expected = torch.lerp(table[:, below], table[:, above], (between - below) / (above - below))
        torch.testing.assert_close(table[:, between], expected)
    alone = learn_levels(vectors, atoms, (7, 15)).table
    for sparsity, like in ((1, 7), (7, 7), (15, 15), (31, 15)):
        torch.testing.assert_close(alone[:, sparsity], table[:, like])
    for sparsity in (2, 6, 8, 15):
        plain = share_lost(vectors, pursue(vectors, atoms, sparsity)[2])
        quantized = share_lost(vectors, pursue(vectors, atoms, sparsity, Levels(table).of(sparsity))[2])
        assert plain < quantized < plain + 0.02


def test_levels_of_a_few_values_are_those_values():
    ratios = torch.linspace(-0.9, 0.8, 15)
    vectors = torch.zeros(1, 15, 16)
    vectors[0, :, 2], vectors[0, :, 5] = 1, ratios  # on the axes: the largest, and a share of it
    atoms = torch.cat((torch.zeros(1, 16), torch.eye(16)))[None]
    levels = learn_levels(vectors, atoms, (2,)).of(2)[0]
    torch.testing.assert_close(levels, torch.cat((ratios, torch.ones(1))), atol=1e-3, rtol=0)


def test_evaluation_is_what_the_caches_records_lose():
    atoms = unit_atoms(round_atoms(random_atoms(2, 64, 32), 4))
    vectors = torch.randn(2, 100, 32, generator=seeded(8)) * torch.tensor([1.0, 7.0])[:, None, None]
    levels = learn_levels(vectors, atoms)
    lost = evaluate(vectors, atoms, levels, [2, 8, 15])
    for sparsity, values in lost.items():
        for group in range(2):
            book = Codebook(atoms[group], levels.of(sparsity)[group], torch.zeros(1, 32), torch.ones(1, 32))
            records = reference.encode_vectors(vectors[group], book, sparsity)
            left = vectors[group] - reference.decode_vectors(records, book, sparsity)
            assert float(values[group]) == pytest.approx(share_lost(vectors[group], left), rel=1e-4)
    assert (lost[2] > lost[8]).all() and (lost[8] > lost[15]).all()


def test_usage_is_a_share_of_what_is_chosen():
    atoms = torch.cat((torch.zeros(1, 4), torch.eye(4)))[None].repeat(2, 1, 1)
    vectors = torch.zeros(2, 4, 4)  # nothing in the second group to code
    vectors[0, :3, 0], vectors[0, 3, 2], vectors[0, 0, 1] = 5, 5, 1
    usage = count_usage(vectors, atoms, 3)
    torch.testing.assert_close(usage, torch.tensor([[0, 0.6, 0.2, 0.2, 0], [0.0] * 5]))
    usage = count_usage(torch.randn(2, 50, 32, generator=seeded(9)), random_atoms(2, 64, 32), 15)
    torch.testing.assert_close(usage.sum(1), torch.ones(2))
    assert not usage[:, 0].any()


def learners_of(layers: list[int], shared: bool = True) -> LayerLearners:
    return LayerLearners(layers, LearnSettings(atoms=16, shared=shared, sparsity=3, batch=128), seed=0, device="cpu")


def random_store(layers: int, tokens: int, seed: int) -> torch.Tensor:
    """Two heads of very different mean, in the dtype of a model."""
    store = torch.randn(layers, 2, tokens, 2, 16, generator=seeded(seed))
    store[..., 0] *= 5
    store[:, :, :, 1] += 20
    return store.half()


def test_layers_learn_the_same_wherever_their_group_learns(monkeypatch):
    """Two GPUs made another file than one: their shares cut through layers that learn together."""
    monkeypatch.setitem(layer_learners.LAYERS_AT_ONCE, "cpu", 4)  # two layers of two heads
    store, held_out = random_store(5, 300, 0), random_store(5, 100, 1)
    queries = random_store(5, 1, 2)[:, 0, 0].float().square()

    def learned(layers):
        learners = learners_of(layers, shared=False)
        rows = slice(layers[0], layers[-1] + 1)
        learners.learn(store[rows], 2, 0, queries=queries[rows])
        return learners.finish(store[rows], held_out[rows]).tensors

    whole = learned([*range(5)])
    shares = share_layers(range(5), ["cpu", "cpu"], layer_learners.layers_at_once("cpu", copies=2))
    parts = [learned(layers) for _, layers in shares]
    assert len(parts) == 2
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
    cut = [learned([0, 1, 2]), learned([3, 4])]
    assert not torch.equal(whole["key_atoms"], torch.cat([part["key_atoms"] for part in cut]))


@pytest.mark.parametrize("shared", [False, True])
def test_layers_become_a_part_of_the_file(shared):
    store, held_out = random_store(2, 300, 0), random_store(2, 100, 1)
    learners = learners_of([4, 5], shared=shared)
    learners.learn(store, 2, 0, queries=random_store(2, 1, 2)[:, 0, 0].float().square())
    losses = learners.held_out(held_out)
    assert {s: tuple(table.shape) for s, table in losses.items()} == {7: (2, 2), 15: (2, 2)}
    assert not learners.settled(0.5)
    learners.learn(store, 2, 1, cooling=(0.0, 1.0))
    learners.held_out(held_out)
    assert learners.settled(1.0) and not learners.settled(-1.0)
    done = learners.finish(store, held_out)
    assert done.rounds == 2 and set(done.errors["key"]) == {"7", "15"}
    torch.testing.assert_close(done.tensors["value_mean"], store[:, 1].float().mean(1), rtol=1e-4, atol=1e-3)
    for at, kv in enumerate(("key", "value")):
        atoms = unit_atoms(unpack_atoms(done.tensors[f"{kv}_atoms"], 8))
        for layer in range(2):
            mean, levels = done.tensors[f"{kv}_mean"][layer], done.tensors[f"{kv}_levels"][layer, 7]
            stretch = done.tensors[f"{kv}_stretch"][layer]
            assert torch.equal(stretch, torch.ones(2, 16)) == (kv == "value")
            vectors = (held_out[layer, at].float() - mean) / stretch
            book = Codebook(atoms[layer], levels, mean, stretch)
            assert len(book.atoms) == (1 if shared else 2)
            layout = CodeLayout(16, 2, 7, 7, element_bytes=4)
            records = reference.encode_heads(held_out[layer, at].float(), book, layout, kv)
            left = held_out[layer, at].float() - reference.decode_heads(records, book, layout, kv, torch.float32)
            # Learned and measured at unit energy: the scale is rounded elsewhere than in the cache.
            assert done.errors[kv]["7"][layer] == pytest.approx(share_lost(vectors, left / stretch), rel=0.02)


def test_keys_are_stretched_by_the_queries_they_meet():
    queries = torch.tensor([[[4.0, 1.0, 1.0, 0.0]]])
    plain, half, full = (key_stretch(queries, power)[0, 0] for power in (0.0, 0.5, 1.0))
    assert torch.equal(plain, torch.ones(4))
    torch.testing.assert_close(full[1] / full[0], torch.tensor(2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(half[1] / half[0], torch.tensor(2.0).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(full.log().mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert full[3] > full[1] and full.isfinite().all()


def test_a_layer_learns_the_same_alone_and_beside_others():
    store = random_store(3, 200, 2)
    together, alone = learners_of([0, 1, 2]), learners_of([2])
    together.learn(store, 3, 0)
    alone.learn(store[2:], 3, 0)
    assert torch.equal(together.learners[2].atoms, alone.learners[0].atoms)


def test_levels_and_errors_come_from_all_heads():
    store = random_store(1, 512, 3)  # of 1024 rows every second would be taken, all of one head
    rows = learners_of([0])._sample(store)
    assert len(rows) == 512 and (rows % 2).float().mean() == 0.5 and rows.max() >= 1022 - 2


def test_learning_goes_on_alike_from_its_state():
    store, held_out = random_store(2, 200, 4), random_store(2, 50, 5)
    whole, first = learners_of([0, 1]), learners_of([0, 1])
    for learners in (whole, first):
        learners.learn(store, 2, 0)
        learners.held_out(held_out)
    second = learners_of([0, 1])
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    assert second.losses == whole.losses
    for learners in (whole, second):
        learners.learn(store, 2, 1, cooling=(0.0, 1.0))
    a, b = (learners.finish(store, held_out) for learners in (whole, second))
    assert a.errors == b.errors and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_vectors_too_large_to_square_are_refused_before_a_step():
    store = random_store(2, 200, 4).float()
    store[1, 1] *= 1e30
    with pytest.raises(ValueError, match=r"layer 5 cannot be learned, as its value scales are NaN or infinite"):
        learners_of([4, 5]).learn(store, 2, 0)


def test_learning_that_ends_in_no_number_is_refused():
    store = random_store(2, 200, 4)
    learners = learners_of([4, 5])
    learners.learn(store, 1, 0)
    learners.learners[1].atoms[0, 3, 2] = float("nan")  # would be stored as zeros
    with pytest.raises(ValueError, match=r"layer 5 cannot be learned, as its key atoms are NaN"):
        learners.held_out(store)
