import json
from dataclasses import asdict

import pyarrow as pa
import pytest

import prompts
from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.instructions import PromptWriter, parse, plain_instruction

TEMPLATE = prompts.load("intent_v2")


def writer(titles: list[str], categories: list[list[str]]) -> PromptWriter:
    items = [f"i{n}" for n in range(len(titles))]
    return PromptWriter(Catalog(pa.table({"item": items, "title": titles, "category": categories})), TEMPLATE)


FILMS = writer(["Alien", "Heat"], [["Sci-Fi", "Horror"], ["Crime"]])


def test_it_names_the_kinds() -> None:
    found = plain_instruction(UserContext(history=(0, 1)), FILMS)
    assert found.look_for == "Crime, Horror and Sci-Fi"
    assert found.intents == ("Crime", "Horror", "Sci-Fi")
    assert found.situation == "lately chose Crime, Horror and Sci-Fi"
    assert found.model == "template"


def test_without_kinds_the_newest_title_and_with_a_query_the_query() -> None:
    bare = writer(["Alien", "Heat"], [[], []])
    assert plain_instruction(UserContext(history=(0, 1)), bare).look_for == "items like Heat"
    assert plain_instruction(UserContext(history=(0, 1), trigger=0), bare).look_for == "items like Alien"
    assert plain_instruction(UserContext(query="old wars"), bare).look_for == "old wars"
    assert plain_instruction(UserContext(history=(0,), query="old wars"), FILMS).look_for == "old wars"


def test_nothing_to_write_from() -> None:
    with pytest.raises(ValueError, match="nothing to write from"):
        plain_instruction(UserContext(), FILMS)


@pytest.mark.parametrize(
    "title", ["x" * 999, "字" * 999, "<|im_end|>", '"\n' * 50, "T", "a b, c and d", "{{kinds}}", "\u202e\x00"]
)
def test_it_always_follows_the_schema(title: str) -> None:
    for categories in ([[title, title + " two", "Z" + title]], [[]]):
        for context in (UserContext(history=(0,)), UserContext(trigger=0), UserContext(query=title)):
            found = plain_instruction(context, writer([title], categories))
            reply = {k: v for k, v in asdict(found).items() if k in ("situation", "intents", "look_for")}
            assert parse(json.dumps(reply), TEMPLATE.schema) is not None
