import json

import pytest

import prompts
from genrec.instructions.parse import LONGEST_REPLY, parse

SCHEMA = prompts.load("intent_v2").schema
GOOD = {"situation": "likes films", "intents": ["more drama", "war films"], "look_for": "war dramas"}


def reply(**change: object) -> str:
    return json.dumps(GOOD | change)


def test_a_plain_reply() -> None:
    instruction = parse(reply(), SCHEMA)
    assert instruction is not None
    assert (instruction.situation, instruction.intents) == ("likes films", ("more drama", "war films"))
    assert instruction.look_for == "war dramas"
    assert instruction.model == instruction.prompt_version == instruction.context_hash == ""


@pytest.mark.parametrize(
    "around",
    [
        "Sure! Here it is:\n```json\n%s\n```\nEnjoy.",
        "{not json} {} %s",
        '{"situation": "half" %s',
        "%s %s",
        "[%s]",
    ],
)
def test_junk_around_the_object_does_not_matter(around: str) -> None:
    assert parse(around.replace("%s", reply()), SCHEMA) == parse(reply(), SCHEMA) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot help with that.",
        reply()[:-10],
        "[]",
        "null",
        json.dumps({k: v for k, v in GOOD.items() if k != "look_for"}),
        reply(extra=1),
        reply(intents=[]),
        reply(intents=["a"] * 4),
        reply(intents="more drama"),
        reply(look_for=None),
        reply(look_for="x" * 161),
        reply(situation=""),
        reply(look_for=" ,.; "),
        reply(intents=["  ", "--"]),
        reply(situation="<|im_end|>"),
        "{" * 100_000,
        '{"a":' * 50_000,
        " " * LONGEST_REPLY + reply(),
    ],
)
def test_invalid_replies_give_none(text: str) -> None:
    assert parse(text, SCHEMA) is None


def test_the_first_object_that_follows_the_schema_wins() -> None:
    text = reply(look_for="") + reply(look_for="second") + reply(look_for="third")
    assert getattr(parse(text, SCHEMA), "look_for", None) == "second"


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ("comedy, comedy, comedy", "comedy"),
        ("Comedy and comedy and drama", "Comedy and drama"),
        ("drama, war and romance", "drama, war and romance"),
        ("silly comedy, and romance, comedy,", "silly comedy, and romance, comedy"),
        ("war films about the", "war films"),
        ("line\nbreak <|im_start|>system", "line break system"),
        ("fragrance, very long words up to the bound of eighty characters, 1.0 Ounce/ 1.0 O", None),
    ],
)
def test_strings_are_cleaned_and_tidied(text: str, tidy: str | None) -> None:
    instruction = parse(reply(look_for=text[:80]), SCHEMA)
    assert instruction is not None
    if tidy is None:  # cut by the bound: the broken word goes
        assert len(text[:80]) == 80 and not instruction.look_for.endswith("O") and instruction.look_for in text
    else:
        assert instruction.look_for == tidy


def test_equal_intents_are_one() -> None:
    assert getattr(parse(reply(intents=["drama", "drama.", "war"]), SCHEMA), "intents", None) == ("drama", "war")
