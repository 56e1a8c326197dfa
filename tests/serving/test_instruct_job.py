import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

import prompts
from genrec.contracts import Instruction, UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, context_hash, open_store
from serving.instruct import MAX_TOKENS, REMINDER, InstructReport, instruct
from serving.llm import Chat, Scripted

TEMPLATE = prompts.load("intent_v1")
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
        digest = context_hash(CONTEXTS[3], CATALOG, TEMPLATE.version)
        assert store.get("u3", "home") == Instruction(
            "s", ("i",), "like Film 4", "", "scripted", TEMPLATE.version, digest, 7.0
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

    def evidence(contexts: list[UserContext]) -> list[tuple[str, ...]]:
        asked.append(len(contexts))
        return [(f"Told of {context.user}.",) for context in contexts]

    with open_store(tmp_path / "s.sqlite") as store:
        model = Scripted(echo)
        instruct(CONTEXTS, CATALOG, model, TEMPLATE, store, chunk=4, evidence=evidence)
        assert asked == [4, 4, 2]
        assert [f"Known: Told of u{n}." in call[-1]["content"] for n, call in enumerate(model.calls)] == [True] * 10


def test_progress_is_reported_after_each_chunk(tmp_path: Path) -> None:
    lines: list[str] = []
    with open_store(tmp_path / "s.sqlite") as store:
        instruct(CONTEXTS, CATALOG, Scripted(echo), TEMPLATE, store, chunk=4, report=lines.append)
    assert [line.split(" users")[0] for line in lines] == ["4/10", "8/10", "10/10"]
    assert "10 written" in lines[-1] and "instructions/s" in lines[-1] and "tokens/s" in lines[-1]


def test_a_chunk_that_fails_leaves_the_ones_before(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.sqlite") as store:
        with pytest.raises(IndexError):
            run(store, Scripted([echo([{"content": f'"Film {n}"'}]) for n in range(6)]))
        assert store.count() == 4


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
        assert run(store, model, []) == InstructReport(asked=0)
