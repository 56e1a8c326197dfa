"""The composition root over a tiny real bundle: known users, unknown ones, filters, steering, traces, bad input."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests_support import HOSTILE_TITLE, readable

from genrec import Recommender
from genrec.bundle import Bundle, seal
from genrec.candidates import allowed_items, shortlist
from genrec.cli import main
from genrec.contracts import Instruction, Trace
from genrec.data import load_dataset
from genrec.errors import GenrecError
from genrec.instructions.store import open_store, query_key
from training.config import FitConfig
from training.fit import fit
from ui import session


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Path) -> Recommender:
    return Recommender.load(tiny_bundle)


def items(trace: Trace) -> list[str]:
    return [r.item for r in trace.recommended]


def test_a_known_user_gets_new_items_best_first(recommender: Recommender) -> None:
    context = recommender.context(user="u1")
    trace = recommender.recommend(context, k=7)
    assert len(trace.recommended) == 7 == len(set(items(trace)))
    assert not {r.row for r in trace.recommended} & set(context.history)
    scores = [r.score for r in trace.recommended]
    assert scores == sorted(scores, reverse=True)


def test_the_score_is_the_weighted_sum_of_its_parts(recommender: Recommender) -> None:
    weights = {"markov": 0.5, "content": 2.0, "generator": 0.3}
    trace = recommender.recommend(recommender.context(user="u2"), weights=weights)
    for r in trace.recommended:
        assert r.score == pytest.approx(sum(weights[n] * r.parts[n] for n in weights), abs=1e-4)
    assert trace.weights == weights


def test_a_batch_equals_single_requests(recommender: Recommender) -> None:
    contexts = [recommender.context(user=f"u{i}") for i in range(5)] + [recommender.context(history=[])]
    together = recommender.recommend_batch(contexts, k=5)
    assert [items(t) for t in together] == [items(recommender.recommend(c, k=5)) for c in contexts]
    assert recommender.recommend_batch([]) == []


def test_what_is_known_about_users_goes_from_the_file_to_the_request(
    shop_folder: Path, tiny_config: Callable[..., FitConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "shop"
    shutil.copytree(shop_folder, data)
    users = load_dataset(shop_folder).sequences.users
    rows = [f"{u},{('free', 'paid')[i % 2]},{u}@x" for i, u in enumerate(users)]
    (data / "users.csv").write_text("\n".join(["user,Plan,mail", *rows]))
    bundle = fit(tiny_config(tmp_path / "bundle", data=str(data)))
    told = Recommender.load(bundle)
    assert (
        told.bundle.generator.config.profiles
        and told.bundle.dataset.notes["attributes"] == f"plan; left out: mail; of {len(users)} of {len(users)} users"
    )
    assert told.context(users[1]).attributes == (("plan", "paid"),)
    assert told.context(users[1], history=[]).attributes == (("plan", "paid"),)
    assert told.context(history=[]).attributes == told.context(users[1], attributes=()).attributes == ()
    ask = ["recommend", "--bundle", str(bundle), "--history", "tea-1", "--json", "--attribute"]
    scores = []
    for given in ("plan=free", "Plan= FREE", "plan=paid"):
        assert main([*ask, given]) == 0
        found = json.loads(capsys.readouterr().out)["recommended"]
        scores.append(sorted((r["item"], r["score"]) for r in found))
    assert scores[0] == scores[1] != scores[2]
    assert main(["trace", "--bundle", str(bundle), "--history", "tea-1", "--attribute", "plan=paid"]) == 0
    assert "Profile: plan paid" in capsys.readouterr().out
    with pytest.raises(GenrecError, match="unknown attribute 'plna'; those of this bundle's users: plan"):
        told.context(history=[], attributes=[("plna", "paid")])
    edited = session.Session(users[1], told.context(users[1]).history[:-1], edited=True)
    form = session.Form(edited, weights=session.chosen_weights(told, "home"))
    assert session.ask(told, form).context.attributes == (("plan", "paid"),)


def test_an_unknown_user_with_a_history_is_served_like_a_known_one(recommender: Recommender) -> None:
    known = recommender.context(user="u3")
    ids = [recommender.bundle.dataset.catalog.item(r) for r in known.history]
    visitor = recommender.context(user="never seen", history=ids)
    assert items(recommender.recommend(visitor)) and visitor.history == known.history


def test_an_empty_history_gets_what_is_popular(recommender: Recommender) -> None:
    trace = recommender.recommend(recommender.context(history=[]), k=3)
    train = recommender.bundle.tools["popularity"].score_all([recommender.context(history=[])])[0]
    assert [r.row for r in trace.recommended] == np.lexsort((np.arange(len(train)), -train))[:3].tolist()


def test_filters_hold(recommender: Recommender) -> None:
    context = recommender.context(user="u4")
    plain = items(recommender.recommend(context, k=10))
    assert not set(items(recommender.recommend(context, k=10, deny=plain[:3]))) & set(plain[:3])
    only = [f"soap-{i}" for i in range(10)]
    assert set(items(recommender.recommend(context, k=10, allow=only))) <= set(only)
    assert items(recommender.recommend(context, allow=only[:1], deny=only[:1])) == []


def test_more_is_returned_when_more_is_asked(recommender: Recommender) -> None:
    context = recommender.context(history=["tea-1"])
    assert len(recommender.recommend(context, k=59).recommended) == 59
    assert len(recommender.recommend(context, k=500).recommended) == 59


def test_instructions_have_one_order_of_precedence(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    recommender = Recommender.load(folder)
    vectors = {"cheese": recommender.bundle.embeddings[30], "soap": recommender.bundle.embeddings[50]}
    recommender.bundle.config["embeddings"] = ""  # as if the shop had been embedded from text
    recommender.bundle.__dict__["embedder"] = lambda texts: np.stack([vectors[t] for t in texts])
    user = recommender.context(user="u1")
    assert recommender.recommend(user).instruction_source == "default"
    recommender.bundle.store.put_many([("u1", "home", Instruction("s", ("i",), "cheese"))])
    stored = recommender.recommend(user)
    assert stored.instruction_source == "stored" and stored.instruction.look_for == "cheese"
    asked = recommender.context(user="u1", scenario="search", query=" soap ")
    assert recommender.recommend(asked).instruction_source == "query"
    given = recommender.recommend(asked, instruction="cheese")
    assert given.instruction_source == "given" and given.instruction.look_for == "cheese"
    assert recommender.recommend(user, instruction="  ").instruction_source == "stored"
    assert dict(given.beam) != dict(recommender.recommend(asked).beam)


def test_a_text_is_embedded_once_and_the_oldest_are_forgotten(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(list(texts))
        return np.stack([recommender.bundle.embeddings[len(t)] for t in texts])

    recommender.bundle.__dict__["embedder"] = embed
    monkeypatch.setattr("genrec.recommender.EMBEDDED", 2)
    user = recommender.context(user="u1")
    first = recommender.recommend(user, instruction="tea")
    assert recommender.recommend(user, instruction="tea").beam == first.beam and asked == [["tea"]]
    both = recommender.recommend_batch([user] * 3, instructions=["tea", "soap!", "soap!"])
    assert asked == [["tea"], ["soap!"]] and dict(both[0].beam).keys() == dict(first.beam).keys()
    recommender.recommend_batch([user] * 3, instructions=["a", "bc", "defg"])  # more than are kept
    assert asked[-1] == ["a", "bc", "defg"] and list(recommender._embedded) == ["bc", "defg"]
    recommender.recommend(user, instruction="tea")
    assert asked[-1] == ["tea"]


def test_a_search_text_with_a_stored_rewriting_is_followed_by_that(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    vectors = {"Something for bread; cheese": recommender.bundle.embeddings[30]}
    recommender.bundle.__dict__["embedder"] = lambda texts: np.stack(
        [vectors.get(t, recommender.bundle.embeddings[50]) for t in texts]
    )
    user = recommender.context(user="u1")
    raw = recommender.recommend(user, instruction="something FOR bread")
    assert raw.instruction_source == "given"
    key = query_key("something for bread")
    recommender.bundle.store.put_many([(*key, Instruction("s", ("i",), "cheese"))])
    found = recommender.recommend(user, instruction="  Something for bread ")
    assert found.instruction_source == "rewritten"
    assert found.instruction.look_for == "Something for bread; cheese"  # what was typed leads
    assert found.context.query == "Something for bread"  # the tools hear what was typed
    assert dict(found.beam) != dict(raw.beam)
    searched = recommender.recommend(recommender.context(user="u2", scenario="search", query="something for bread"))
    assert searched.instruction_source == "rewritten"
    assert recommender.recommend(user, instruction="bread").instruction_source == "given"
    assert recommender.recommend(user).instruction_source == "default"  # a rewriting is nobody's instruction


def test_a_text_typed_at_home_is_a_search_that_every_part_hears(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    user = recommender.context(user="u1")
    found = recommender.recommend(user, instruction="cheese number")
    assert (found.context.scenario, found.context.query) == ("search", "cheese number")
    assert found.weights == {"content": 1.0, "generator": 0.5} and not found.note
    assert sum(item.startswith("cheese") for item in items(found)[:5]) >= 3  # this user never chose any
    written = recommender.recommend(user, instruction=Instruction("s", ("i",), "cheese"))
    assert (written.context.scenario, written.context.query) == ("home", None)
    assert written.weights == {n: w for n, w in recommender.bundle.fusion("home")["fused"].items() if w}
    kept = recommender.recommend(recommender.context(user="u1", scenario="discovery"), instruction="cheese")
    assert (kept.context.scenario, kept.context.query) == ("discovery", "cheese")
    nobody = recommender.recommend(recommender.context(history=[]), instruction="cheese number")
    assert all(item.startswith("cheese") for item in items(nobody)[:3])


def test_a_batch_of_several_scenarios_is_the_same_as_one_by_one(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    names = ["home", "item", "home", "discovery", "search", "item"]
    asked = [recommender.context(user=f"u{i}", scenario=s) for i, s in enumerate(names)]
    told = [None, None, "cheese", None, "tea", Instruction("s", ("i",), "jam")]
    together = recommender.recommend_batch(asked, 5, told)
    for context, text, trace in zip(asked, told, together, strict=True):
        alone = recommender.recommend(context, 5, text)
        assert items(trace) == items(alone) and trace.weights == alone.weights and trace.context == alone.context


def test_the_trace_says_when_nothing_hears_the_instruction(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    deaf = recommender.recommend(recommender.context(user="u1"), instruction="cheese", weights={"ease": 1.0})
    assert "no weight to a part that reads the instruction" in deaf.note
    assert not recommender.recommend(recommender.context(user="u1"), weights={"ease": 1.0}).note


def test_a_stored_instruction_is_followed_without_a_language_model(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    recommender.bundle.store.put_many([("u1", "home", Instruction("s", ("i",), "cheese"))])
    for name in [m for m in sys.modules if m.split(".")[0] in ("serving", "vllm")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("serving", "vllm", "prompts"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error now
    found = recommender.recommend(recommender.context(user="u1"))
    assert (found.instruction_source, len(found.recommended)) == ("stored", 10)
    assert not [m for m in sys.modules if m.startswith(("serving.", "vllm."))]


def test_an_expired_instruction_leaves_the_learned_default(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    user, item = recommender.context(user="u1"), recommender.context(user="u1", scenario="item")
    default = recommender.recommend(user)
    store = recommender.bundle.store
    store.put_many([("u1", "home", Instruction("s", ("i",), "cheese", created=100.0))])
    assert recommender.recommend(item).instruction_source == "stored"  # that of home, where the scenario has none
    assert store.expire(before=101.0) == 1
    again = recommender.recommend(user)
    assert again.instruction_source == "default" and again.recommended == default.recommended


def test_a_store_that_fails_fails_no_request(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bundle"
    recommender = readable(shutil.copytree(tiny_bundle, folder))
    user = recommender.context(user="u1")
    expected = recommender.recommend(user).recommended
    path = folder / "instructions.sqlite"
    path.write_bytes(b"damaged" * 1000)
    for _ in range(3):
        found = recommender.recommend(user)
        assert found.instruction_source == "default" and found.recommended == expected
    said = [r.message for r in caplog.records if r.name == "genrec.recommender"]
    assert len(said) == 1 and "go on without stored instructions" in said[0] and str(path) in said[0]
    path.unlink()
    recommender.bundle.store.put_many([("u1", "home", Instruction("s", ("i",), "cheese"))])
    assert recommender.recommend(user).instruction_source == "default"  # it is not asked again at once
    monkeypatch.setattr("genrec.recommender.STORE_REST", 0.0)
    recommender._store_back = 0.0
    assert recommender.recommend(user).instruction_source == "stored"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # a writer in the middle keeps no reader waiting
    begun = time.monotonic()
    assert recommender.recommend(user).instruction_source == "stored" and time.monotonic() - begun < 1
    other.close()


def test_a_store_server_that_is_down_fails_no_request(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    recommender = readable(folder)
    user = recommender.context(user="u1")
    expected = recommender.recommend(user).recommended
    recommender.bundle.__dict__["store"] = open_store(f"redis://127.0.0.1:{port}/0?prefix=shop")
    for _ in range(2):
        found = recommender.recommend(user)
        assert found.instruction_source == "default" and found.recommended == expected
    said = [r.message for r in caplog.records if r.name == "genrec.recommender"]
    assert len(said) == 1 and "go on without stored instructions" in said[0]


def test_a_bundle_in_a_read_only_folder_needs_no_store(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = readable(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = sorted((tmp_path / "bundle").rglob("*"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert recommender.recommend(recommender.context(user="u1")).instruction_source == "default"
    assert sorted((tmp_path / "bundle").rglob("*")) == before


def test_a_bundle_of_own_embeddings_cannot_read_text(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender = Recommender.load(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    recommender.bundle.store.put_many([("u1", "home", Instruction("s", ("i",), "cheese"))])
    user = recommender.context(user="u1")
    assert recommender.recommend(user).instruction_source == "default"
    with pytest.raises(GenrecError, match="own embeddings and cannot read text"):
        recommender.recommend(user, instruction="cheese")
    with pytest.raises(GenrecError, match="own embeddings"):
        recommender.recommend(recommender.context(history=[], query="soap"))


def test_weights_of_another_architecture_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    file = folder / "generator" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("start")
    save_file(tensors, file, metadata={"format": "pt"})
    seal(folder, Bundle.load(tiny_bundle).config)
    with pytest.raises(GenrecError, match="another version of the generator"):
        Bundle.load(folder).generator  # noqa: B018


def test_the_trace_is_json_and_tells_everything(recommender: Recommender) -> None:
    context = recommender.context(history=["tea-3", "tea-4"], scenario="item")
    trace = recommender.recommend(context, k=4)
    told = json.loads(json.dumps(trace.as_dict(recommender.bundle.dataset.catalog), allow_nan=False))
    assert told["context"]["trigger"]["item"] == "tea-4"
    assert {e["tool"] for e in told["evidence"]} == set(recommender.bundle.tools)
    assert all(e["sentence"] for e in told["evidence"])
    assert len(told["beam"]) == 4 and all(b["log_probability"] <= 0 for b in told["beam"])
    assert len(told["recommended"][0]["semantic_id"]) == 3
    assert set(told["seconds"]) == {"tools", "generator", "instruction", "evidence"}
    assert "<script>" in told["context"]["history"][0]["title"] and "\x1b" not in json.dumps(told)
    assert HOSTILE_TITLE.startswith(told["context"]["history"][0]["title"][:25])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"history": ["no-such-item"]}, "unknown item 'no-such-item'"),
        ({"user": "nobody"}, "unknown user 'nobody'"),
        ({"history": [], "scenario": "moon"}, "unknown scenario 'moon'"),
        ({"history": ["tea-1"], "trigger": "x"}, "unknown item 'x'"),
    ],
)
def test_bad_requests_are_one_clear_line(recommender: Recommender, call: dict, says: str) -> None:
    with pytest.raises(GenrecError, match=says) as error:
        recommender.context(**call)
    assert "\n" not in str(error.value)


def test_bad_options_are_one_clear_line(recommender: Recommender) -> None:
    context = recommender.context(history=[])
    with pytest.raises(GenrecError, match="k is 0"):
        recommender.recommend(context, k=0)
    with pytest.raises(GenrecError, match="unknown part 'magic'"):
        recommender.recommend(context, weights={"magic": 1.0})
    with pytest.raises(GenrecError, match="unknown item 'x'"):
        recommender.recommend(context, deny=["x"])


def test_a_shortlist_judges_every_item_by_every_part(recommender: Recommender) -> None:
    bundle = recommender.bundle
    contexts = [recommender.context(user=f"u{i}") for i in range(6)]
    allowed = allowed_items(contexts, len(bundle.dataset.catalog))
    found = shortlist(
        contexts, bundle.tools, bundle.fusion("home")["floors"], bundle.generator, allowed, width=8, most=9
    )
    for rows, beam, ok in zip(found.rows, found.beam, allowed, strict=True):
        real = rows[rows >= 0]
        assert len(set(real)) == len(real) >= 9 and ok[real].all()
        assert set(beam[beam >= 0]) <= set(real)
    for b, (rows, beam) in enumerate(zip(found.rows, found.beam, strict=True)):
        for w, row in enumerate(beam):
            at = int(np.flatnonzero(rows == row)[0])
            assert found.parts["generator"][b, at] == pytest.approx(found.beam_scores[b, w], abs=1e-4)


def test_without_a_history_the_shortlist_is_what_is_popular_whatever_the_weights(recommender: Recommender) -> None:
    bundle = recommender.bundle
    contexts = [recommender.context(history=[]), recommender.context(user="u1")]
    allowed = allowed_items(contexts, 60)
    found = shortlist(contexts, bundle.tools, {"markov": 1.0}, bundle.generator, allowed, None, 4, 5)
    popularity, rows = found.raw["popularity"][0], found.rows[0]
    assert sorted(popularity[rows[rows >= 0]])[-3:] == sorted(popularity)[-3:]
    alone = shortlist(contexts, {}, {}, bundle.generator, allowed, width=4)
    assert alone.rows.shape == (2, 4) and set(alone.parts) == {"generator"}
    tools = shortlist(contexts, bundle.tools, {"markov": 1.0}, None, allowed, most=5)
    assert "generator" not in tools.parts and tools.rows.shape == (2, 5)
