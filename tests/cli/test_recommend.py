"""`genrec recommend` and `trace`: filters, empty histories, safe text, bad requests and bundles."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import Capture, error_of, json_of
from tests_support import readable

from genrec.bundle import FORMAT
from genrec.cli import main
from genrec.contracts import Instruction
from genrec.instructions.store import open_store
from training.config import TOOLS


def test_recommend_keeps_to_its_filters(tiny_bundle: Path, capsys: Capture) -> None:
    ask = ("recommend", "--bundle", str(tiny_bundle), "--history", "tea-1,tea-2", "--k", "5")
    found = json_of(capsys, *ask)
    items = [r["item"] for r in found["recommended"]]
    assert len(items) == 5 and not {"tea-1", "tea-2"} & set(items)
    assert found["user"] is None and found["instruction_source"] == "default"
    without = [r["item"] for r in json_of(capsys, *ask, "--deny", items[0])["recommended"]]
    assert items[0] not in without and items[1] in without
    only = json_of(capsys, *ask, "--allow", "jam-1,jam-2,tea-1")["recommended"]
    assert {r["item"] for r in only} == {"jam-1", "jam-2"}
    assert json_of(capsys, *ask, "--allow", "tea-1")["recommended"] == []
    assert main([*ask, "--allow", "tea-1"]) == 0 and "Nothing is left" in capsys.readouterr().out


def test_query_instruction_and_scenario_each_change_the_list(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ready = readable(own_bundle)
    monkeypatch.setattr("genrec.commands._load", lambda _: ready)
    ask = ("recommend", "--bundle", str(own_bundle), "--user", "u1", "--k", "6")
    plain = json_of(capsys, *ask)

    def told(*flags: str) -> tuple[dict, list[str]]:
        found = json_of(capsys, *ask, *flags)
        items = [r["item"] for r in found["recommended"]]
        assert items != [r["item"] for r in plain["recommended"]]
        return found, items

    found, items = told("--query", "cheese number")
    assert found["instruction_source"] == "query" and sum(i.startswith("cheese") for i in items) >= 3
    found, items = told("--instruction", "cheese number")
    assert found["instruction_source"] == "given" and sum(i.startswith("cheese") for i in items) >= 3
    found, items = told("--scenario", "item", "--trigger", "soap-1")
    assert found["instruction_source"] == "default" and "soap-1" not in items
    alone = {"floors": {"content": 1.0}, "fused": {"generator": 1.0}}  # the same weights for both
    ready.bundle.weights.update(home=alone, discovery=alone)
    lists = [json_of(capsys, *ask, "--k", "40", "--scenario", s)["recommended"] for s in ("home", "discovery")]
    assert [r["item"] for r in lists[0]] != [r["item"] for r in lists[1]]
    assert not any(r["item"].startswith("cheese") for r in plain["recommended"])


def test_an_empty_history_gets_popular_items(tiny_bundle: Path, capsys: Capture) -> None:
    found = json_of(capsys, "trace", "--bundle", str(tiny_bundle), "--history", "", "--k", "3")
    assert found["context"]["history"] == [] and set(found["fusion_weights"]) == {"popularity"}
    assert len(found["recommended"]) == 3


def test_trace_is_readable_and_safe(tiny_bundle: Path, capsys: Capture) -> None:
    ask = ("trace", "--bundle", str(tiny_bundle), "--history", "coffee-1,tea-3", "--scenario", "item")
    whole = json_of(capsys, *ask)
    assert whole["context"]["trigger"]["item"] == "tea-3" and {e["tool"] for e in whole["evidence"]} == set(TOOLS)
    assert main(ask) == 0
    out = capsys.readouterr().out
    for said in ("Fusion weights:", "Tool markov:", "The generator's own list", "Seconds:", "[bold]tea"):
        assert said in out
    assert whole["recommended"][0]["title"] in out
    assert not [c for c in out if c != "\n" and not c.isprintable()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--user", "nobody"], "unknown user 'nobody'"),
        (["--history", "tea-1,ghost"], "unknown item 'ghost'"),
        (["--history", "tea-1", "--scenario", "guess"], "unknown scenario 'guess'"),
        (["--history", "tea-1", "--k", "0"], "at least 1"),
        (["--history", "tea-1", "--deny", "ghost"], "unknown item 'ghost'"),
        (["--history", "tea-1", "--scenario", "item", "--trigger", "\x1b[31mghost"], "unknown item"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], says: str, tiny_bundle: Path, capsys: Capture) -> None:
    line = error_of(capsys, "recommend", "--bundle", str(tiny_bundle), *arguments)
    assert says in line and line.isprintable()


def test_a_bad_bundle_is_one_line(own_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    def ask() -> list[str]:
        return [
            error_of(capsys, command, "--bundle", str(own_bundle), *more)
            for command, *more in (["recommend", "--user", "u1"], ["eval"], ["eval", "--again"], ["instruct"])
        ]

    weights = own_bundle / "generator" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1])
    assert all("damaged" in line for line in ask())
    weights.write_bytes(kept)
    manifest = own_bundle / "bundle.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    assert all("format 99" in line for line in ask())
    manifest.write_text("[]")
    assert all("a bundle of format None" in line for line in ask())
    manifest.write_text("{")
    assert all("not valid JSON" in line for line in ask())
    assert "no such folder" in error_of(capsys, "recommend", "--bundle", str(tmp_path / "none"), "--user", "u1")


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Inside, root is nobody: folder permissions bind."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("stored", [True, False])
def test_a_bundle_in_a_read_only_folder_serves(
    stored: bool, tiny_bundle: Path, scripted: list[str], capsys: Capture
) -> None:
    from genrec.recommender import Recommender
    from ui.session import begin

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bundle = shutil.copytree(tiny_bundle, Path(folder) / "bundle")
        if stored:
            told = Instruction("a morning", ("tea",), "green tea", "", "tiny", "v1", "ab")
            with open_store(bundle / "instructions.sqlite") as store:
                store.put_many([("u1", "home", told)])
        for path in (bundle, *bundle.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted(path.name for path in bundle.iterdir())
        with without_rights():
            with pytest.raises(PermissionError):
                (bundle / "new").touch()
            where = ("--bundle", str(bundle))
            assert len(json_of(capsys, "recommend", *where, "--user", "u1", "--k", "3")["recommended"]) == 3
            assert json_of(capsys, "trace", *where, "--user", "u1")["context"]["user"] == "u1"
            assert json_of(capsys, "eval", *where)["rows"] and json_of(capsys, "eval", *where, "--again")["rows"]
            recommender = Recommender.load(bundle)
            assert begin(recommender, "u1", "home").user == "u1"  # the page
            assert (recommender.bundle.store.get("u1", "home") is not None) == stored
            assert "cannot" in error_of(capsys, "instruct", *where, "--users", "2") and scripted == []
            assert sorted(path.name for path in bundle.iterdir()) == before
        for path in (bundle, *bundle.rglob("*")):
            path.chmod(0o755)
