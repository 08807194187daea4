"""Uneven bytes: answers from given histories, attention drawn, who is chosen, gates, texts, rows; on the CPU."""

import itertools
import json
import lzma
from types import SimpleNamespace

import pytest
import torch

from vllm_lexico.dictionary.file import load_dictionary

TEXT = [2 + (7 * i + i * i // 3) % 26 for i in range(150)]
PROMPTS = [[5, 9, 3, 8, 21], [4, 4, 17], [11, 2, 6, 19, 7, 23, 12, 14]]


@pytest.fixture(scope="module")
def uneven(import_benchmark):
    return import_benchmark("uneven")


@pytest.fixture(scope="module")
def bench(uneven, import_benchmark):
    names = ("asked_model", "uneven_cases", "uneven_texts", "gates", "restretched")
    return SimpleNamespace(**{name: import_benchmark(f"bench.{name}") for name in names})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_letters_model):
    return write_letters_model(tmp_path_factory.mktemp("tiny"), layers=3, kv_heads=2)


@pytest.fixture(scope="module")
def dictionary(folder, load_benchmark):
    return load_benchmark("bench/shapes").write_random_dictionary(folder, atoms=64)


@pytest.fixture(scope="module")
def model(bench, folder):
    return bench.asked_model.AskedModel(str(folder), "cpu")


@pytest.fixture(scope="module")
def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    words = [a + b + c + "ing" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    texts = [{"text": "\n\n".join(" ".join(words[i + j :][:40]) for i in range(3))} for j in range(2)]
    qas = [{"question": f"which {word}", "answers": [word]} for word in words[:3]]
    passages = [{"context": " ".join(words[i : i + 5]), "qas": qas} for i in range(12)]
    for name, rows in (("train_textbooks", texts), ("xquad_en", passages)):
        with lzma.open(made / f"{name}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return made


@torch.no_grad()
def greedy(plain, ids, most):
    said = []
    for _ in range(most):
        said.append(int(plain(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


def test_answers_from_an_exact_history_are_the_models_own(model, plain):
    exact = model.compute(TEXT)
    twice = [tuple(kv.repeat(2, 1, 1, 1) for kv in both) for both in exact]
    wanted = [greedy(plain, TEXT + prompt, 9) for prompt in PROMPTS]
    assert len(set(map(tuple, wanted))) == 3
    assert model.answer(twice, PROMPTS, 9, set()) == wanted * 2
    end = wanted[0][4]
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in wanted]
    assert model.answer(exact, PROMPTS, 9, {end}) == cut


def test_each_way_is_read_by_its_own_answers(model):
    exact = model.compute(TEXT)
    changed = [(key.repeat(2, 1, 1, 1), torch.cat((value, value.roll(1, 2)))) for key, value in exact]
    both = model.answer(changed, PROMPTS, 9, set())
    alone = model.answer([tuple(kv[1:] for kv in layer) for layer in changed], PROMPTS, 9, set())
    assert both[:3] == model.answer(exact, PROMPTS, 9, set()) != alone == both[3:]


@torch.no_grad()
def test_drawn_is_the_largest_attention_of_what_follows(model, plain):
    drawn = model.drawn(model.compute(TEXT), PROMPTS)
    of_all = []
    for prompt in PROMPTS:
        attention = plain(torch.tensor([TEXT + prompt]), output_attentions=True).attentions
        rows = torch.stack([layer[0, :, len(TEXT) :, : len(TEXT)] for layer in attention])  # [layers, Hq, T, L]
        of_all.append(rows.unflatten(1, (2, -1)).amax((2, 3)))
    wanted = torch.stack(of_all).amax(0)
    assert drawn.shape == wanted.shape == (3, 2, len(TEXT))
    torch.testing.assert_close(drawn.exp(), wanted, rtol=1e-4, atol=1e-7)


def test_rows_are_listened_to_in_pieces(bench, model, monkeypatch):
    exact = model.compute(TEXT)
    whole = model.drawn(exact, PROMPTS)
    monkeypatch.setattr(bench.asked_model, "SCORES_AT_ONCE", 1000)
    torch.testing.assert_close(model.drawn(exact, PROMPTS), whole)


@torch.no_grad()
def test_energy_is_of_queries_that_look_at_the_text(bench, model, plain, monkeypatch):
    seen, attention = [], bench.asked_model.attention_with_lse
    monkeypatch.setattr(
        bench.asked_model, "attention_with_lse", lambda query, *rest: seen.append(query) or attention(query, *rest)
    )
    energy = torch.zeros(3, 2, 16)
    model.drawn(model.compute(TEXT), PROMPTS[:1], energy)
    given = plain(torch.tensor([TEXT + PROMPTS[0]]), output_attentions=True).attentions
    for layer, (attended, query) in enumerate(zip(given, seen, strict=True)):
        share = attended[0, :, len(TEXT) :, : len(TEXT)].sum(-1).view(2, -1, 1)  # [Hk, G * T, 1]
        torch.testing.assert_close(energy[layer], (share * query[0].square()).sum(1), rtol=1e-4, atol=1e-5)


def test_another_stretch_moves_errors_between_numbers(bench, model, dictionary):
    from bench.vector_codecs import DictionaryCodec

    loaded, own = load_dictionary(dictionary), torch.ones(3, 2, 16)
    keys = model.compute(TEXT)[1][0][0].transpose(0, 1).contiguous()
    plain = DictionaryCodec(loaded, "cpu", 5, 5)(1, "key", keys)
    kind = bench.restretched.RestretchedCodec
    assert torch.equal(kind(loaded, "cpu", 5, own)(1, "key", keys), plain)
    torch.testing.assert_close(kind(loaded, "cpu", 5, 2 * own)(1, "key", keys), plain, rtol=1e-4, atol=1e-4)
    uneven = own.clone()
    uneven[..., :4] = 0.2
    changed = kind(loaded, "cpu", 5, uneven)(1, "key", keys)
    error, before = ((read - keys).square().sum((0, 1)) for read in (changed, plain))
    assert error[:4].sum() < 0.7 * before[:4].sum() and error[4:].sum() > before[4:].sum()


def test_stretches_of_rotary_pairs(bench):
    far = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(5)) + 0.1
    own = bench.restretched.key_stretch(far, 0.5)
    made = bench.restretched.stretches(own, far, {"pairs", "far", "far pairs"})
    torch.testing.assert_close(made["far"], own)
    pairs = (far[..., :8] + far[..., 8:]) / 2
    torch.testing.assert_close(made["far pairs"], bench.restretched.key_stretch(pairs, 0.5).repeat(1, 1, 2))
    torch.testing.assert_close(made["pairs"], made["far pairs"], rtol=1e-2, atol=1e-2)  # but for what silence is given


def test_quotas_fill_the_bytes_and_no_more(bench):
    every = bench.uneven_cases.cases(28)
    by_name = {case.name: case for case in every}
    # 128 * 32 bytes, less 128 * 16 for the small records and 16 for the mask, by 48: 42.3
    assert by_name["oracle 3/15"].quota == 42
    assert by_name["oracle 7/31"].quota == 42  # 128 * 64 - 128 * 32 - 16 by 96: 42.5
    assert by_name["oracle keys 3/15"].quota == 42  # the same, of keys alone: half of all bytes
    scores = torch.rand(28, 2, 700, generator=torch.Generator().manual_seed(0))
    coded = range(16, 604)
    for case in every[1:]:
        chosen = bench.uneven_cases.choose(scores, coded, case) if case.high else None
        taken = bench.uneven_cases.mean_bytes(case, 28, chosen, coded)
        assert 2 * (case.mean + 1) - 1 < taken <= 2 * (case.mean + 1), case.name
    assert {case.scope for case in every} < set(bench.uneven_cases.SCOPES)


@pytest.mark.parametrize("scope", ["span", "block", "page", "head", "layer", "model"])
def test_the_best_of_each_group_are_chosen(bench, scope):
    scores = torch.randn(3, 2, 300, generator=torch.Generator().manual_seed(1))
    case, coded = bench.uneven_cases.Case("a case", 7, (3, 3), (15, 15), scope=scope), range(16, 280)
    chosen = bench.uneven_cases.choose(scores, coded, case)
    assert chosen.shape == scores.shape and not chosen[..., :16].any() and not chosen[..., 280:].any()
    everyone = [(layer, head) for layer in range(3) for head in range(2)]
    ends = [16, *range(32, 280, 32), 280] if scope == "span" else [16, 128, 256, 280]
    spans = [range(*both) for both in itertools.pairwise(ends)]
    alone, together = [[one] for one in everyone], [everyone[i : i + 2] for i in (0, 2, 4)]
    heads = {
        "span": alone, "block": alone, "head": alone, "page": together, "layer": together, "model": [everyone],
    }[scope]  # fmt: skip
    for group in heads:
        for span in spans if scope in ("span", "block", "page") else [coded]:
            own = torch.cat([scores[at][span.start : span.stop] for at in group])
            marked = torch.cat([chosen[at][span.start : span.stop] for at in group])
            assert int(marked.sum()) == len(own) * 42 // 128
            assert own[marked].min() > own[~marked].max()


def test_each_head_has_its_share_of_each_block(bench):
    scores = torch.randn(2, 2, 384, generator=torch.Generator().manual_seed(6))
    shares = torch.tensor([[0.0, 0.25], [0.5625, 0.5]])  # 1.3125 of 4 heads: 42 of 128 on average
    case, coded = bench.uneven_cases.Case("a case", 7, (3, 3), (15, 15), scope="model"), range(384)
    chosen = bench.uneven_cases.choose(bench.uneven_cases.in_shares(scores, shares), coded, case)
    assert chosen.unflatten(2, (3, 128)).sum(-1).tolist() == [[[0] * 3, [32] * 3], [[72] * 3, [64] * 3]]
    for head, count in (((0, 1), 32), ((1, 0), 72)):
        best = scores[head][128:256].topk(count).indices + 128
        assert chosen[head][best].all()


def test_each_case_reads_its_own_codes(bench, model, dictionary):
    loaded, exact, coded = load_dictionary(dictionary), model.compute(TEXT), range(16, 140)
    kind = bench.uneven_cases
    wanted = [
        kind.Case("exact"), kind.Case("even", 2, (2, 2)), kind.Case("mixed", 7, (1, 3), (5, 3)),
        kind.Case("layers", 3, by_layer=((1, 2), (3, 4), (5, 1))),
    ]  # fmt: skip
    chosen = {"mixed": torch.rand(3, 2, len(TEXT), generator=torch.Generator().manual_seed(2)) > 0.5}
    from bench.vector_codecs import DictionaryCodec

    def code(size, layer, kv, vectors):
        of_part = vectors[0, :, 16:140].transpose(0, 1)
        return DictionaryCodec(loaded, "cpu", size, size)(layer, kv, of_part).transpose(0, 1)

    for layer in (0, 2):
        keys, values = kind.read_back(
            layer, exact[layer], wanted, chosen, coded, lambda size, stretch: DictionaryCodec(loaded, "cpu", size, size)
        )
        for read in (*zip(keys, exact[layer][0][0].expand_as(keys), strict=True),):
            assert (read[0][:, :16] == read[1][:, :16]).all() and (read[0][:, 140:] == read[1][:, 140:]).all()
        assert (keys[0] == exact[layer][0][0]).all() and (values[0] == exact[layer][1][0]).all()
        part = slice(16, 140)
        assert torch.equal(keys[1][:, part], code(2, layer, "key", exact[layer][0]))
        mask = chosen["mixed"][layer, :, part, None]
        small, large = (code(size, layer, "key", exact[layer][0]) for size in (1, 5))
        assert torch.equal(keys[2][:, part], torch.where(mask, large, small))
        assert torch.equal(values[2][:, part], code(3, layer, "value", exact[layer][1]))
        assert torch.equal(keys[3][:, part], code((1, 3, 5)[layer], layer, "key", exact[layer][0]))


def test_what_coding_loses_is_counted_by_head(bench, model):
    exact, coded = model.compute(TEXT), range(16, 140)
    stretch = {"key": torch.full((3, 2, 16), 2.0), "value": torch.rand(3, 2, 16) + 0.5}

    def coder(layer, kv, vectors):  # loses what the token's place says, of two numbers
        place = torch.arange(1.0, 125)[:, None] * torch.tensor([1.0, 10.0])
        error = torch.zeros_like(vectors)
        error[..., :2] = place[..., None] if kv == "key" else 0
        return vectors + error

    lost = bench.uneven_cases.lost_scores(exact, coded, coder, stretch)
    assert lost.shape == (3, 2, len(TEXT)) and (lost[..., :16] < -40).all() and (lost[..., 140:] < -40).all()
    energy = 2 * torch.arange(1.0, 125).square() / 4
    torch.testing.assert_close(lost[1, :, 16:140].exp(), (energy / energy.mean()).expand(2, -1))


def test_layers_are_finer_where_needles_die(bench):
    atoms = bench.uneven_cases.finer_layers(28, 7)
    assert [at for at, (key, _) in enumerate(atoms) if key > 7] == list(range(6, 14))
    assert [at for at, (_, value) in enumerate(atoms) if value > 7] == list(range(14, 21))
    assert sum(map(sum, atoms)) <= 2 * 28 * 7 and min(map(min, atoms)) == 6


def planted(count, generator):
    """Texts whose scores two numbers of keys decide, one per head."""
    histories, scores = [], []
    for _ in range(count):
        vectors = torch.randn(2, 2, 1, 2, 260, 16, generator=generator)
        histories.append([tuple(of_layer) for of_layer in vectors])
        scores.append(torch.stack([vectors[layer, 0, 0, :, :, 3] for layer in range(2)]))
    return histories, scores


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_gates_learn_what_decides(bench, name):
    generator = torch.Generator().manual_seed(3)
    gate = bench.gates.GATES[name](*planted(12, generator), 150)
    (history,), (score,) = planted(1, generator)
    case, coded = bench.uneven_cases.Case("a case", 7, (3, 3), (15, 15), scope="head"), range(16, 250)
    choose = bench.uneven_cases.choose
    found = bench.gates.recall(choose(gate(history), coded, case), choose(score, coded, case))
    blind = bench.gates.recall(choose(score.roll(1, -1), coded, case), choose(score, coded, case))
    assert found > 0.75 > 0.5 > blind


def test_neighbours_are_before_and_after(bench):
    key, value = torch.zeros(2, 1, 1, 6, 2).unbind()
    value[0, 0, :, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    seen = bench.gates.features([(key, value)], 2)[0]  # key, value, before, after
    assert seen[:, 4].tolist() == [0, 0.5, 1.5, 3, 6, 12]
    assert seen[:, 6].tolist() == [3, 6, 12, 24, 16, 0]
    assert torch.equal(bench.gates.ranks(torch.tensor([3.0, 1.0, 2.0])), torch.tensor([0.5, -0.5, 0.0]))


def test_a_text_is_repeated_whole(bench, folder):
    from transformers import AutoTokenizer

    frame = bench.uneven_texts.Frame(AutoTokenizer.from_pretrained(folder), "abc", "xyz")
    ids = frame.encode("thequickbrownfoxjumps")
    pieces = list(bench.uneven_texts.repetitions(frame, ids, 8))
    chunks = [ids[:8], ids[8:16], ids[16:]]
    assert [piece[-len(chunk) :] for piece, chunk in zip(pieces, chunks, strict=True)] == chunks
    asked = [piece[: -len(chunk)] for piece, chunk in zip(pieces, chunks, strict=True)]
    assert all(words[-3:] == frame.encode("xyz") for words in asked) and len(asked[1]) > len(asked[0])


def test_training_reads_texts_of_training_alone(bench, folder, data, tmp_path):
    from transformers import AutoTokenizer

    frame = bench.uneven_texts.Frame(AutoTokenizer.from_pretrained(folder), "abc", "xyz")
    made = bench.uneven_texts.training_texts(frame, data, 90, 3)
    assert [len(ids) for ids in made] == [90] * 3
    (tmp_path / "xquad_en.jsonl.xz").write_bytes((data / "xquad_en.jsonl.xz").read_bytes())
    with pytest.raises(ValueError, match=r"train_\*.jsonl.xz"):
        bench.uneven_texts.training_texts(frame, tmp_path, 90, 3)
    with pytest.raises(ValueError, match="'needle_many'"):
        bench.uneven_texts.make_texts(["needle_many"], None, data, 1)


def test_every_passage_asked_about_is_in_its_text(bench, folder, data):
    from transformers import AutoTokenizer

    texts = bench.uneven_texts.QaTexts(AutoTokenizer.from_pretrained(folder), data, 4, 2)
    asked = []
    for index in range(6):
        text = texts.text(index)
        members = [
            at for at, each in enumerate(texts.passages) if has(text.ids, texts.frame.encode(each.text + "\n\n"))
        ]
        assert len(members) == 4 and len(text.prompts) == len(text.values) == 2
        assert set(texts._order[2 * index : 2 * index + 2]) <= set(members)
        asked += texts._order[2 * index : 2 * index + 2]
    assert len(set(asked)) == 12


def has(ids, part):
    return any(ids[at : at + len(part)] == part for at in range(len(ids)))


def test_a_sign_test_of_few_answers(uneven):
    assert uneven.sign_test(5, 0) == pytest.approx(2 / 32)
    assert uneven.sign_test(2, 9) == uneven.sign_test(9, 2) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert uneven.sign_test(3, 3) == uneven.sign_test(0, 0) == 1


def test_every_case_has_its_row(uneven, folder, dictionary, data, tmp_path, capsys):
    names = [
        "exact",
        "even 7",
        "oracle 3/15",
        "oracle 3/15 by model",
        "mlp 3/15",
        "linear 3/15",
        "random 3/15",
        "lost 3/15",
        "heads 3/15",
        "layers 3/15",
        "mlp 3/15 in shares",
        "even 15 far pairs",
    ]
    options = "--tasks qa_2 pairs_2 --texts 2 --questions 2 --chunk 200 --gate-texts 1 --gate-tokens 120 --gate-steps 3"
    files = ["--data", data, "--dictionary", dictionary, "--results", tmp_path, "--answers", tmp_path / "answers.jsonl"]
    args = [str(folder), *map(str, files), *options.split(), "--cases", *names]
    uneven.run(uneven.parse_args(args))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 * len(names)
    rows = [json.loads(line) for line in (tmp_path / "uneven.jsonl").read_text().splitlines()]
    for task in ("qa_2", "pairs_2"):
        assert sorted(row["case"]["way"] for row in rows if row["case"]["task"] == task) == sorted(names)
    for row in rows:
        case = row["case"]
        assert case["questions"] == 4 and row["metric"] == "found" and row["peer"] == "exact"
        assert row["value"] - row["peer_value"] == pytest.approx((case["won"] - case["lost"]) / 4)
        assert ("vector_bytes" in case) == (case["way"] != "exact")
        assert ("recall" in case) == (case["way"].split()[0] in ("mlp", "linear", "random", "lost", "heads", "layers"))
    assert len({line["answer"] for line in lines}) > 4  # ways differ
    uneven.run(uneven.parse_args([*args[: -len(names)], "exact", "even 7", "--seconds", "1e-3"]))
    assert "time is up after 0 of 2 texts" in capsys.readouterr().out
    assert len((tmp_path / "uneven.jsonl").read_text().splitlines()) == len(rows)


def test_lost_and_won_are_counted_by_question(uneven, tmp_path):
    found = {"exact": [1, 1, 1, 0], "even 7": [0, 0, 1, 1], "mlp 3/15": [1, 1, 1, 0]}
    facts = {"exact": {}, "even 7": {"vector_bytes": 16}, "mlp 3/15": {"vector_bytes": 15.5, "recall": 0.5}}
    lines = [
        {"task": "qa_2", "case": case, "text": at // 2, "question": at % 2, "found": found[case][at]} | facts[case]
        for at in range(4)
        for case in found
    ]
    uneven.write_rows(lines, {"model": "tiny"}, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "uneven.jsonl").read_text().splitlines()]
    assert [(row["value"], row["peer_value"]) for row in rows] == [(0.75, 0.75), (0.5, 0.75), (0.75, 0.75)]
    counts = [(row["case"]["questions"], row["case"]["lost"], row["case"]["won"]) for row in rows]
    assert counts == [(4, 0, 0), (4, 2, 1), (4, 0, 0)]
    assert rows[2]["case"]["recall"] == 0.5 and rows[2]["case"]["vector_bytes"] == 15.5


@pytest.mark.gpu
def test_attention_on_a_gpu_has_the_lse_of_its_twin(bench):
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, 3, n, 128, generator=generator).bfloat16() for n in (37, 1000, 1000))
    got = bench.asked_model.attention_with_lse(query.cuda(), key.cuda(), value.cuda(), 0.3)
    for fast, plain in zip(got, bench.asked_model.attention_with_lse(query, key, value, 0.3), strict=True):
        torch.testing.assert_close(fast.float().cpu(), plain, rtol=2e-2, atol=2e-2)
