import socket
import time
from email.utils import formatdate
from typing import Any

import pytest

import serving.llm.endpoint as endpoint
from genrec.contracts import LanguageModel
from genrec.errors import GenrecError
from serving.llm import Endpoint, PromptTooLong, open_model
from tests.serving.endpoint_server import Reply, Server, completion, error, serving, slow

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
CHATS = [[{"role": "user", "content": f"question {n}"}] for n in range(12)]


def echo(_: Server, body: dict[str, Any]) -> Reply:
    return completion(body["messages"][-1]["content"].upper())


ECHOED = [chat[-1]["content"].upper() for chat in CHATS]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSES", (0.01, 0.05))
    monkeypatch.delenv(endpoint.KEY, raising=False)


def one_line(caught: pytest.ExceptionInfo[GenrecError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what it asks for and what it gives ---------------------------------------------------------------


def test_texts_come_in_order_with_the_schema_and_the_counts() -> None:
    def script(_: Server, body: dict[str, Any]) -> Reply:  # the first asked answers last
        return slow(0.001 * (12 - int(body["messages"][-1]["content"][9:])), echo(_, body))

    with serving(script) as server:
        model = Endpoint(server.url)
        assert isinstance(model, LanguageModel) and (model.name, model.url) == ("tiny", f"{server.url}/v1")
        assert model.generate(CHATS, SCHEMA, 7) == ECHOED
        assert (model.prompt_tokens, model.output_tokens, model.failures) == (120, 36, 0)
        assert model.generate([]) == []
        sent = server.calls[0]
        assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("tiny", 7, 0.0)
        assert sent["response_format"]["json_schema"]["schema"] == SCHEMA and "repetition_penalty" not in sent
        model.generate(CHATS[:1])
        assert "response_format" not in server.calls[-1]
        model.close()
        model.close()
        with pytest.raises(RuntimeError, match="closed"):
            model.generate(CHATS)


def test_no_more_than_the_bound_are_under_way() -> None:
    with serving(lambda s, body: slow(0.02, echo(s, body))) as server:
        assert Endpoint(server.url, concurrency=3).generate(CHATS) == ECHOED
        assert server.most == 3


def test_what_only_vllm_knows_goes_to_vllm_alone() -> None:
    with serving(echo, models=(("m", "vllm"),)) as server:
        Endpoint(server.url).generate(CHATS[:1])
        assert server.calls[0]["repetition_penalty"] == 1.05


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(echo) as server:
        Endpoint(server.url).generate(CHATS[:1])
        monkeypatch.setenv(endpoint.KEY, "secret")
        Endpoint(server.url).generate(CHATS[:1])
        assert [h.get("Authorization") for h in server.headers] == [None, "Bearer secret"]


def test_the_model_is_the_only_one_or_a_chosen_one() -> None:
    with serving(echo, models=(("a", ""), ("b", ""))) as server:
        with pytest.raises(GenrecError, match="has 2 models, choose one with --model: a, b"):
            Endpoint(server.url)
        with pytest.raises(GenrecError, match="has no model 'c'; there are: a, b"):
            Endpoint(server.url, "c")
        assert Endpoint(server.url, "b").name == "b"
    with serving(echo, models=()) as server:  # a server without a list of models
        assert Endpoint(server.url, "x").generate(CHATS[:1]) == ECHOED[:1]
        with pytest.raises(GenrecError, match="404: no such page; check the URL"):
            Endpoint(server.url)


def test_it_runs_beside_a_running_event_loop() -> None:
    import asyncio

    async def inside(url: str) -> list[str]:
        return Endpoint(url).generate(CHATS[:2])

    with serving(echo) as server:
        assert asyncio.run(inside(server.url)) == ECHOED[:2]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        (" http://h:8000/v1/ ", "http://h:8000/v1"),
        ("https://h/openai/v2/chat/completions", "https://h/openai/v2"),
        ("http://[::1]:8000/", "http://[::1]:8000/v1"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert endpoint._base(url) == base


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h", "http://", "http://h:x", "http://h/v1?a=b"])
def test_what_is_no_address_is_one_clear_line(url: str) -> None:
    with pytest.raises(GenrecError, match=r"give one like http://127\.0\.0\.1:8000/v1") as caught:
        Endpoint(url)
    one_line(caught)


def test_a_key_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(GenrecError, match="GENREC_API_KEY") as caught:
        Endpoint("http://me:secret@h/v1")
    assert "secret" not in one_line(caught)


# -- what may pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: error(429),
        lambda: error(500),
        lambda: error(503),
        lambda: None,  # a cut connection
        lambda: (200, {}, "<html>gateway</html>"),
        lambda: (200, {}, '{"choices": []}'),
        lambda: (200, {}, "[1]"),
        lambda: (200, {"content-length": "500"}, '{"choices"'),  # cut in the middle of the body
        lambda: (502, {}, "bad gateway"),
    ],
    ids=["429", "500", "503", "cut", "garbage", "no choices", "no object", "half", "502"],
)
def test_what_passes_is_asked_for_again(trouble: Any) -> None:
    def script(server: Server, body: dict[str, Any]) -> Reply | None:
        return echo(server, body) if server.seen(body) > 2 else trouble()

    with serving(script) as server:
        model = Endpoint(server.url, timeout=0.3)
        assert model.generate(CHATS[:4]) == ECHOED[:4]
        assert model.failures == 8 and len(server.calls) == 12


def test_a_slow_answer_is_asked_for_again() -> None:
    def script(server: Server, body: dict[str, Any]) -> Reply:
        return slow(0.6, echo(server, body)) if server.seen(body) == 1 else echo(server, body)

    with serving(script) as server:
        model = Endpoint(server.url, timeout=0.2)
        assert model.generate(CHATS[:3]) == ECHOED[:3] and model.failures == 3


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_the_server_says_how_long_to_wait(date: bool) -> None:
    def script(server: Server, body: dict[str, Any]) -> Reply:
        after = formatdate(time.time() + 2, usegmt=True) if date else "1"
        return error(429, **{"retry-after": after}) if server.seen(body) == 1 else echo(server, body)

    with serving(script) as server:
        begun = time.monotonic()
        assert Endpoint(server.url).generate(CHATS[:2]) == ECHOED[:2]
        assert 0.9 < time.monotonic() - begun < 3


def test_a_reply_without_text_is_an_empty_one() -> None:
    with serving(lambda s, body: (200, {}, '{"choices": [{"message": {"content": null}}], "usage": null}')) as server:
        model = Endpoint(server.url)
        assert model.generate(CHATS[:2]) == ["", ""] and model.output_tokens == 0


# -- what does not ------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_one_clear_line_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    with pytest.raises(GenrecError, match=r"does not answer .*; is this the address of a running server") as caught:
        open_model(endpoint=url)
    assert url in one_line(caught) and time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (lambda: error(429, "quota\nused up"), "answers 429: quota used up, for"),
        (lambda: None, "does not answer"),
        (lambda: (200, {}, "<html>"), "does not answer in JSON but with: <html>"),
        (lambda: (200, {}, '{"no": "choices"}'), "no chat completion: {'no': 'choices'}"),
        (lambda: slow(0.6, error(500)), "did not answer within 0.2 s"),
        (lambda: error(429, "come back tomorrow", **{"retry-after": "86400"}), "come back tomorrow"),
    ],
    ids=["429", "cut", "garbage", "no choices", "slow", "wait"],
)
def test_patience_ends_in_one_clear_line(trouble: Any, said: str) -> None:
    slow_enough = 0.2 if "0.2 s" in said else 30.0  # a busy machine answers late, too
    with serving(lambda s, body: trouble()) as server:
        model = Endpoint(server.url, timeout=slow_enough, patience=0.3)
        with pytest.raises(GenrecError, match="the same command goes on from there") as caught:
            model.generate(CHATS)
        assert said in one_line(caught)
        assert model.failures > 0


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (401, "who are you", "answers 401: who are you; set GENREC_API_KEY"),
        (403, "not for you", "set GENREC_API_KEY"),
        (404, "The model does not exist", "check the URL and the model"),
        (400, "response_format json_schema is not supported", "held to a JSON schema: choose a server that can"),
        (422, "Invalid schema: maxLength", "held to a JSON schema"),
        (400, "temperature must be positive", "answers 400: temperature must be positive"),
        (301, "moved", "answers 301"),
    ],
)
def test_a_refusal_is_one_clear_line_and_not_repeated(status: int, message: str, said: str) -> None:
    with serving(lambda s, body: error(status, message)) as server:
        model = Endpoint(server.url, concurrency=1)
        with pytest.raises(GenrecError) as caught:
            model.generate(CHATS, SCHEMA)
        assert said in one_line(caught) and len(server.calls) == 1 and model.failures == 0


def test_the_first_refusal_ends_the_others() -> None:
    def script(server: Server, body: dict[str, Any]) -> Reply:
        return error(401) if body["messages"] == CHATS[0] else slow(0.5, echo(server, body))

    with serving(script) as server:
        begun = time.monotonic()
        with pytest.raises(GenrecError, match="401"):
            Endpoint(server.url, concurrency=2).generate(CHATS)
        assert time.monotonic() - begun < 0.4 and len(server.calls) < 5


def test_prompts_that_do_not_fit_leave_the_others_their_replies() -> None:
    def script(server: Server, body: dict[str, Any]) -> Reply:
        if body["messages"] in CHATS[:2]:
            return error(400, "This model's maximum context length is 20 tokens. However, you requested 96.")
        return echo(server, body)

    with serving(script) as server:
        model = Endpoint(server.url)
        with pytest.raises(PromptTooLong, match="maximum context length is 20 tokens") as caught:
            model.generate(CHATS, SCHEMA)
        assert caught.value.replies == [None, None, *ECHOED[2:]] and model.failures == 0
        assert len(server.calls) == 12 and model.output_tokens == 30


def test_another_backend_beside_an_endpoint_is_refused() -> None:
    with pytest.raises(GenrecError, match="--backend vllm and --endpoint are two ways"):
        open_model("vllm", endpoint="http://h/v1")
    with pytest.raises(GenrecError, match="concurrency is 0"):
        Endpoint("http://h/v1", concurrency=0)


def test_open_model_says_what_it_asks() -> None:
    said: list[str] = []
    with serving(echo) as server:
        model = open_model(model="tiny", report=said.append, endpoint=server.url, concurrency=5)
        assert isinstance(model, Endpoint) and model.concurrency == 5
        assert said == [f"language model backend: tiny at {server.url}/v1, 5 requests at once"]
