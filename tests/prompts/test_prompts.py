import shutil
from pathlib import Path

import pytest

import prompts
from genrec.errors import GenrecError
from prompts.__main__ import main

EMPTY = dict.fromkeys(("scenario", "history", "kinds", "trigger", "query", "evidence"), "")


@pytest.mark.parametrize("name", prompts.names())
def test_every_template_loads_and_fills(name: str) -> None:
    template = prompts.load(name)
    assert template.version.startswith(f"{name}+")
    chat = template.fill(EMPTY | {"history": "HISTORY"})
    assert [turn["role"] for turn in chat][:2] == ["system", "user"] and chat[-1]["role"] == "user"
    assert "HISTORY" in chat[-1]["content"] and "{{" not in chat[-1]["content"]
    assert sum(len(turn["content"]) for turn in chat) < 1500  # short: a small model on a CPU reads it


def test_load_is_cached_and_intent_v1_is_there() -> None:
    assert prompts.load("intent_v1") is prompts.load("intent_v1")


def test_unknown_prompt_lists_what_there_is() -> None:
    with pytest.raises(GenrecError, match=r"unknown prompt '\.\./x'; there are: .*intent_v1"):
        prompts.load("../x")


def test_values_are_filled_in_once() -> None:
    text = prompts.load("intent_v1").fill(EMPTY | {"history": "{{query}}", "query": "secret"})[-1]["content"]
    assert "Chosen: {{query}}\nSearched for: secret" in text


def test_a_missing_value_is_a_programming_error() -> None:
    with pytest.raises(KeyError):
        prompts.load("intent_v1").fill({"history": "x"})


def copy(folder: Path, old: str = "", new: str = "", schema: tuple[str, str] = ("", "")) -> Path:
    for suffix, change in ((".md", (old, new)), (".schema.json", schema)):
        text = (prompts.FOLDER / f"intent_v1{suffix}").read_text(encoding="utf-8")
        assert change[0] in text
        (folder / f"intent_v1{suffix}").write_text(text.replace(*change), encoding="utf-8")
    return folder / "intent_v1.md"


def test_the_version_follows_the_content(tmp_path: Path) -> None:
    same = prompts.read(copy(tmp_path)).version
    assert same == prompts.load("intent_v1").version
    assert prompts.read(copy(tmp_path, "sturdy", "solid")).version != same
    assert prompts.read(copy(tmp_path, schema=('"maxItems": 3', '"maxItems": 2'))).version != same


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("recent: 4\n", "", "must begin with 'recent: N' and 'sentences: N'"),
        ("## system", "## wizard", "must be system, user or assistant"),
        ("Page: {{scenario}}", "Page: {{weather}}", "unknown placeholder {{weather}}"),
        ('Chosen: "Emma"', "Chosen: {{history}}", "placeholders belong into the last turn"),
        ('"look_for":"famous', '"look_at":"famous', "example does not follow the schema: example.look_at is not"),
        ('"intents":["famous science fiction"]', '"intents":', "example does not follow the schema: not JSON"),
        ("Page: {{scenario}}", "## assistant\n", "the last one user"),
    ],
)
def test_bad_templates_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(GenrecError, match=words):
        prompts.read(copy(tmp_path, old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"look_for"', '"seek"', "no property 'look_for'"),
        ('"minItems": 1', '"uniqueItems": true', "unsupported schema keyword 'uniqueItems'"),
        ('"type": "object",', "", "needs a type"),
        ('"type": "object",', '"type": "object"', "not valid JSON"),
    ],
)
def test_bad_schemas_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(GenrecError, match=words):
        prompts.read(copy(tmp_path, schema=(old, new)))


def test_a_missing_schema_is_refused(tmp_path: Path) -> None:
    shutil.copy(prompts.FOLDER / "intent_v1.md", tmp_path)
    with pytest.raises(GenrecError, match=r"schema\.json is missing"):
        prompts.read(tmp_path / "intent_v1.md")


def test_the_command_shows_a_filled_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["intent_v1"]) == 0
    out = capsys.readouterr().out
    assert prompts.load("intent_v1").version in out and '"Brazil (1985)"' in out and '"look_for"' in out
    assert main(["nothing"]) == 2
    assert "unknown prompt" in capsys.readouterr().err
