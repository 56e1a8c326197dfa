import json
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import prompts
from genrec.contracts import Evidence, Instruction, UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, context_hash, open_store
from genrec.instructions.schema import violation
from genrec.instructions.sqlite_store import SQLiteStore
from serving.instruct import MAX_TOKENS, REMINDER, InstructReport, in_shard, instruct
from serving.llm import Chat, Endpoint, Scripted
from serving.llm.base import generate_fitting
from tests.serving.endpoint_server import Reply, Server, completion, serving

TEMPLATE = prompts.load("intent_v2")
CATALOG = Catalog(
    pa.table(
        {
            "item": [f"i{n}" for n in range(9)],
            "title": [f"Film {n}" for n in range(9)],
            "category": [[f"Kind {n % 3}"] for n in range(9)],
        }
    )
)
CONTEXTS = [UserContext(history=(n % 9, (n + 1) % 9), user=f"u{n}") for n in range(10)]


def echo(chat: Chat) -> str:
    """Looks for the last title of the prompt."""
    title = chat[-1]["content"].split('"')[-2]
    return json.dumps({"situation": "s", "intents": ["i"], "look_for": f"like {title}"})


def run(
    store: InstructionStore, model: Scripted, contexts: list[UserContext] = CONTEXTS, chunk: int = 4
) -> InstructReport:
    return instruct(contexts, CATALOG, model, TEMPLATE, store, chunk=chunk, clock=lambda: 7.0)


def test_every_user_gets_an_instruction_with_its_provenance(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        done = run(store, Scripted(echo))
        assert (done.asked, done.written, done.current, done.empty, done.retried, done.replaced) == (10, 10, 0, 0, 0, 0)
        assert done.output_tokens > 0 and done.prompt_tokens > done.output_tokens and done.seconds > 0
        digest = context_hash(CONTEXTS[3], CATALOG, TEMPLATE)
        assert store.get("u3", "home") == Instruction(
            "s", ("i",), "like Film 4", "", "scripted", TEMPLATE.version, digest, 7.0, 2
        )
        assert store.count() == 10


def test_who_is_up_to_date_is_skipped_and_who_changed_is_written_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        run(store, Scripted(echo))
        again = Scripted(echo)
        done = run(store, again)
        assert (done.written, done.current) == (0, 10) and again.calls == []
        changed = [replace(c, history=(*c.history, 8)) if c.user == "u5" else c for c in CONTEXTS]
        done = run(store, again, changed)
        assert (done.written, done.current, len(again.calls)) == (1, 9, 1)
        assert getattr(store.get("u5", "home"), "look_for", None) == "like Film 8"
        done = run(store, again, [replace(c, scenario="favourites") for c in CONTEXTS])
        assert done.written == 10 and store.count() == 20


def test_invalid_replies_are_asked_for_once_more_and_then_replaced(tmp_path: Path) -> None:
    bounds: list[int] = []

    def stubborn(chat: Chat) -> str:
        text, reminded = chat[-1]["content"], chat[-1]["content"].endswith(REMINDER)
        if '"Film 2"\n' in text:
            return "never"
        return echo(chat) if reminded or '"Film 5"\n' not in text else '{"situation": "cut o'

    class Watched(Scripted):
        def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
            bounds.append(max_tokens)
            assert schema == TEMPLATE.schema
            return super().generate(chats, None, max_tokens)

    with open_store(tmp_path / "s.sqlite") as store:
        model = Watched(stubborn)
        done = run(store, model)
        assert (done.written, done.retried, done.replaced) == (10, 2, 1)
        assert len(model.calls) == 12 and bounds == [MAX_TOKENS, 2 * MAX_TOKENS] * 2 + [MAX_TOKENS]
        found = {user: (i.model, i.look_for) for user, _, i in store.all()}
        assert found["u4"] == ("scripted", "like Film 5")
        assert found["u1"] == ("template", "Kind 2 and Kind 1")
        assert all(i.context_hash and i.prompt_version == TEMPLATE.version for _, _, i in store.all())
        assert run(store, model).current == 10  # a replaced one is up to date: greedy replies would not change


def test_a_context_with_nothing_to_say_is_left_to_the_learned_default(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        model = Scripted(echo)
        done = run(store, model, [UserContext(user="new"), UserContext(user="asks", query="old wars")])
        assert (done.asked, done.written, done.empty) == (2, 1, 1)
        assert store.get("new", "home") is None and len(model.calls) == 1


def test_evidence_is_asked_for_by_chunk_and_reaches_the_prompt(tmp_path: Path) -> None:
    asked: list[int] = []

    def told(contexts: list[UserContext]) -> list[Sequence[Evidence]]:
        asked.append(len(contexts))
        rows = [np.array([int((context.user or "u0")[1:]) % len(CATALOG)]) for context in contexts]
        return [[Evidence("tools", row, np.ones(1, np.float32), "Said.")] for row in rows]

    with open_store(tmp_path / "s.sqlite") as store:
        model = Scripted(echo)
        instruct(CONTEXTS, CATALOG, model, TEMPLATE, store, chunk=4, evidence=told)
        assert asked == [4, 4, 2]
        titles = [CATALOG.title(n % len(CATALOG)) for n in range(10)]
        assert [f'Suggested: "{t}"' in call[-1]["content"] for t, call in zip(titles, model.calls, strict=True)] == [
            True
        ] * 10


def test_progress_is_reported_after_each_chunk(tmp_path: Path) -> None:
    lines: list[str] = []
    with open_store(tmp_path / "s.sqlite") as store:
        instruct(CONTEXTS, CATALOG, Scripted(echo), TEMPLATE, store, chunk=4, report=lines.append)
    assert [line.split(",")[0] for line in lines] == [f"instructions: {n} of 10" for n in (4, 8, 10)]
    assert "10 written" in lines[-1] and "instructions/s" in lines[-1] and "tokens/s" in lines[-1]


def test_a_chunk_that_fails_leaves_the_ones_before(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        with pytest.raises(IndexError):
            run(store, Scripted([echo([{"content": f'"Film {n}"'}]) for n in range(6)]))
        assert store.count() == 4


class Narrow(Scripted):
    """A model that takes short prompts only: its bound is on the last turn's length."""

    def __init__(self, limit: int) -> None:
        super().__init__(echo, "narrow")
        self.limit = limit

    def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
        sizes = [len(chat[-1]["content"]) for chat in chats]
        return generate_fitting(chats, sizes, self.limit, self.name, super().generate)


def test_a_prompt_that_is_too_long_gets_the_template_and_stops_nobody(tmp_path: Path) -> None:
    long = [replace(c, history=c.history * 4) if n % 3 == 1 else c for n, c in enumerate(CONTEXTS)]
    with open_store(tmp_path / "s.sqlite") as store:
        model = Narrow(70)
        done = run(store, model, long)
        assert (done.written, done.replaced, done.retried, len(model.calls)) == (10, 3, 0, 7)
        assert [i.model for _, _, i in store.all()] == ["narrow", "template", "narrow"] * 3 + ["narrow"]
        assert run(store, model, long).current == 10


def test_a_model_that_no_prompt_fits_is_an_error(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        with pytest.raises(GenrecError, match=r"do not fit narrow \(10\)"):
            run(store, Narrow(10))
        assert store.count() == 0


def test_a_changed_schema_makes_everything_stale_and_its_old_replies_invalid(tmp_path: Path) -> None:
    for name in ("intent_v2.md", "intent_v2.schema.json"):
        shutil.copy(prompts.FOLDER / name, tmp_path / name)
    schema = json.loads((tmp_path / "intent_v2.schema.json").read_text())
    schema["properties"]["look_for"]["minLength"] = 12
    (tmp_path / "intent_v2.schema.json").write_text(json.dumps(schema))
    changed = prompts.read(tmp_path / "intent_v2.md")

    def model_of_old_schema(chat: Chat) -> str:
        return echo(chat) if chat[-1]["content"].endswith(REMINDER) else echo(chat).replace("like Film", "F")

    with open_store(tmp_path / "s.sqlite") as store:
        assert run(store, Scripted(model_of_old_schema)).retried == 0
        model = Scripted(model_of_old_schema)
        done = instruct(CONTEXTS, CATALOG, model, changed, store)
        assert (done.written, done.current, done.retried, done.replaced) == (10, 0, 10, 10)
        assert {(i.model, i.prompt_version) for _, _, i in store.all()} == {("template", changed.version)}


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{",
        "null",
        "[1, 2]",
        '{"situation": "s"}',
        '{"situation": 1, "intents": [], "look_for": {}}',
        "\ud800",
        "{" * 9000,
    ],
    ids=["empty", "cut", "null", "list", "drift", "types", "surrogate", "deep"],
)
def test_whatever_the_model_says_what_is_stored_follows_the_schema(reply: str, tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        done = run(store, Scripted(lambda _: reply))
        assert (done.written, done.retried, done.replaced) == (10, 10, 10)
        for _, _, i in store.all():
            value = {"situation": i.situation, "intents": list(i.intents), "look_for": i.look_for}
            assert violation(value, TEMPLATE.schema) is None


def test_shards_share_the_users_between_them(tmp_path: Path) -> None:
    dealt = [[c for c in CONTEXTS if in_shard(c.user or "", n, 3)] for n in range(3)]
    assert sorted(c.user or "" for part in dealt for c in part) == sorted(c.user or "" for c in CONTEXTS)
    assert all(part for part in dealt)
    with open_store(tmp_path / "s.sqlite") as store, open_store(tmp_path / "whole.sqlite") as whole:
        models = [Scripted(echo) for _ in dealt]
        for part, model in zip(dealt, models, strict=True):
            run(store, model, part)
        run(whole, Scripted(echo))
        assert sum(len(model.calls) for model in models) == 10 and store.all() == whole.all()


def test_a_store_that_cannot_be_written_is_found_before_the_model_is_asked_twice(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"SQLite format 3\0 and then nothing of the kind" * 9)
    with open_store(path) as store:
        model = Scripted(echo)
        with pytest.raises(GenrecError, match="damaged"):
            run(store, model)
        assert model.calls == []


def test_failed_calls_are_counted_and_said(tmp_path: Path) -> None:
    class Failing(Scripted):
        def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
            self.failures += 2
            return super().generate(chats)

    with open_store(tmp_path / "s.sqlite") as store:
        done = run(store, Failing(echo))
        assert done.failures == 6 and "6 failed calls repeated" in done.line()


def test_bad_requests_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        model = Scripted(echo)
        with pytest.raises(GenrecError, match="context 10 has no user"):
            run(store, model, [*CONTEXTS, UserContext(history=(1,))])
        with pytest.raises(GenrecError, match="user 'u3' is given twice for scenario 'home'"):
            run(store, model, [*CONTEXTS, CONTEXTS[3]])
        with pytest.raises(GenrecError, match="chunk is 0"):
            run(store, model, chunk=0)
        assert model.calls == [] and store.count() == 0
        assert replace(run(store, model, []), seconds=0.0) == InstructReport(asked=0)


def test_a_store_that_another_process_locks_ends_the_job_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with SQLiteStore(path, patience=0.01) as store:
        other = sqlite3.connect(path, isolation_level=None)
        model = Scripted(echo)
        lines: list[str] = []

        def lock(line: str) -> None:
            lines.append(line)
            if len(lines) == 1:
                other.execute("BEGIN IMMEDIATE")

        with pytest.raises(GenrecError, match="locked by another process") as caught:
            instruct(CONTEXTS, CATALOG, model, TEMPLATE, store, chunk=4, report=lock)
        assert "\n" not in str(caught.value) and store.count() == 4
        other.execute("COMMIT")
        other.close()
        done = run(store, model)
        assert (done.current, done.written) == (4, 6) and store.count() == 10
        assert len(model.calls) == 4 + 4 + 6  # the chunk that could not be stored was asked for again


def test_a_server_that_dies_in_the_middle_ends_the_job_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.llm.endpoint.PAUSES", (0.01, 0.02))
    answered: list[str] = []

    def script(_: Server, body: dict[str, Any]) -> Reply | None:
        if len(answered) >= 5 and "back" not in answered:
            return None  # a cut connection
        answered.append("reply")
        return completion(echo(body["messages"]))

    with serving(script) as server, open_store(tmp_path / "s.sqlite") as store:
        model = Endpoint(server.url, timeout=1.0)
        with pytest.raises(GenrecError) as caught:
            instruct(CONTEXTS, CATALOG, model, TEMPLATE, store, chunk=4)
        assert server.url.removeprefix("http://").split("/")[0] in str(caught.value) and "\n" not in str(caught.value)
        assert store.count() == 4  # the first chunk is whole
        answered.append("back")
        done = instruct(CONTEXTS, CATALOG, model, TEMPLATE, store, chunk=4)
        assert (done.current, done.written, done.replaced) == (4, 6, 0) and store.count() == 10
