"""Any OpenAI-compatible server by its URL: `vllm serve`, a gateway, a provider.

Requests run side by side, at most `concurrency` at once; a server with continuous batching makes one batch of them.
What may pass (429, 500, a timeout, a cut connection, an answer that is no chat completion) is asked for again after
a growing, random pause, or after what Retry-After says, for `patience` seconds; anything else ends the call at once.
The key comes from the environment (GENREC_API_KEY), never from a flag, a file or the URL.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from genrec.errors import GenrecError
from serving.llm.base import Chat, PromptTooLong, repetition_penalty

KEY = "GENREC_API_KEY"
CONCURRENCY = 32
PAUSES = (0.5, 30.0)  # seconds before the second try, and at most
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_TOO_LONG = re.compile(r"context.?length|maximum context|too (?:long|many tokens|large)|prompt.{0,40}exceed", re.I)
_SCHEMA = re.compile(r"response_format|json_schema|schema|structured.output|guided|grammar", re.I)


@dataclass(frozen=True)
class _Answer:
    """text is None for a prompt that does not fit; then `why` says what the server said of it."""

    text: str | None
    prompt_tokens: int = 0
    output_tokens: int = 0
    why: str = ""


class _Passing(Exception):
    """A failure that may pass. after: how long the server asks to wait, seconds."""

    def __init__(self, line: str, after: float | None = None) -> None:
        super().__init__(line)
        self.after = after


class _Refused(GenrecError):
    """The server refuses for good."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status


class _TooLong(Exception):
    """The server says that the prompt does not fit its model."""


class Endpoint:
    """A server with POST /chat/completions that can hold a reply to a JSON schema (response_format json_schema).

    url: its base, such as http://127.0.0.1:8000/v1; without a path /v1 is meant. model: its name there; None takes
    the only one that the server has. timeout: seconds for one request, all of it. patience: seconds for which a
    failing request is repeated. Tokens are counted as the server states them, 0 where it does not.

    Raises GenrecError, one line, when the server does not answer, refuses the key, has no such model, cannot hold
    replies to the schema, or keeps failing. Safe to call from any thread, also beside a running event loop.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrency: int = CONCURRENCY,
        timeout: float = 120.0,
        patience: float = 120.0,
    ) -> None:
        import httpx

        if concurrency < 1:
            raise GenrecError(f"concurrency is {concurrency}; it must be at least 1")
        self.url, self.timeout, self.patience, self.concurrency = _base(url), timeout, patience, concurrency
        self.prompt_tokens = self.output_tokens = self.failures = 0
        key = os.environ.get(KEY, "").strip()
        try:
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
                limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            )
        except (ValueError, UnicodeError) as error:
            raise GenrecError(f"{KEY} or a proxy setting is not usable ({type(error).__name__})") from None
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop,), name="genrec-endpoint", daemon=True).start()
        try:
            self.name, self._extra = self._run(self._find(model))
        except BaseException:
            self.close()
            raise

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See Backend."""
        answers = self._run(self._all(chats, schema, max_tokens))
        self.prompt_tokens += sum(answer.prompt_tokens for answer in answers)
        self.output_tokens += sum(answer.output_tokens for answer in answers)
        why = next((answer.why for answer in answers if answer.text is None), None)
        if why is not None:
            message = f"a prompt does not fit the model {self.name} at {self.url}: {why}"
            raise PromptTooLong(message, [answer.text for answer in answers])
        return [answer.text or "" for answer in answers]

    def close(self) -> None:
        """Ends the connections; further calls fail."""
        if self._loop is not None:
            self._run(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _run(self, work: Any) -> Any:
        """Runs a coroutine in the loop's own thread; an interrupt here cancels it there, open requests included."""
        if self._loop is None:
            work.close()
            raise RuntimeError("the endpoint is closed")
        task = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return task.result()
        except BaseException:
            task.cancel()
            raise

    async def _find(self, model: str | None) -> tuple[str, dict[str, Any]]:
        """(the model's name, parameters beyond OpenAI's own that this server knows)."""
        try:
            found = await self._request("GET", "/models", None)
            models = [(str(entry["id"]), entry.get("owned_by")) for entry in found["data"]]
        except _Passing as error:
            raise GenrecError(f"{error}; is this the address of a running server?") from None
        except _Refused as error:
            if model is None or error.status not in (404, 405):
                raise
            return model, {}  # a server without a list of its models
        except (KeyError, TypeError, AttributeError):
            raise GenrecError(f"{self.url}/models is no list of models; is this an OpenAI-compatible server?") from None
        names = ", ".join(name for name, _ in models[:10]) or "none"
        if model is None and len(models) != 1:
            raise GenrecError(f"{self.url} has {len(models)} models, choose one with --model: {names}")
        chosen = [(name, owner) for name, owner in models if model in (None, name)]
        if not chosen:
            raise GenrecError(f"{self.url} has no model {model!r}; there are: {names}")
        name, owner = chosen[0]
        return name, {"repetition_penalty": repetition_penalty(name)} if owner == "vllm" else {}

    async def _all(self, chats: list[Chat], schema: dict[str, Any] | None, max_tokens: int) -> list[_Answer]:
        """One answer per chat; the first request that fails for good ends the others."""
        places = asyncio.Semaphore(self.concurrency)

        async def one(chat: Chat) -> _Answer:
            async with places:
                return await self._ask(chat, schema, max_tokens)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(chat)) for chat in chats]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, chat: Chat, schema: dict[str, Any] | None, max_tokens: int) -> _Answer:
        body: dict[str, Any] = {"model": self.name, "messages": chat, "max_tokens": max_tokens, "temperature": 0.0}
        body |= self._extra
        if schema is not None:
            form = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        begun, pause = time.monotonic(), PAUSES[0]
        while True:
            try:
                return _answer(await self._request("POST", "/chat/completions", body), self.url)
            except _TooLong as error:
                return _Answer(None, why=str(error))
            except _Passing as error:
                self.failures += 1
                wait = max(error.after or 0.0, random.uniform(pause / 2, pause))
                if time.monotonic() - begun + wait > self.patience:
                    raise GenrecError(
                        f"{error}, for {time.monotonic() - begun:.0f} s; what is finished is stored, "
                        "the same command goes on from there"
                    ) from None
                await asyncio.sleep(wait)
                pause = min(2 * pause, PAUSES[1])

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON of one answer. Raises _Passing, _TooLong or GenrecError."""
        import httpx

        try:
            async with asyncio.timeout(self.timeout):
                reply = await self._client.request(method, self.url + path, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise _Passing(f"{self.url} did not answer within {self.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise _Passing(f"{self.url} does not answer ({_short(str(error)) or type(error).__name__})") from None
        if reply.is_success:
            try:
                value = reply.json()
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise _Passing(f"{self.url} does not answer in JSON but with: {_short(reply.text) or 'nothing'}")
            return value
        said = f"{self.url} answers {reply.status_code}: {_short(_message(reply.text)) or reply.reason_phrase}"
        if reply.status_code in PASSING:
            raise _Passing(said, _seconds(reply.headers.get("retry-after", "")))
        if reply.status_code in (401, 403):
            raise _Refused(f"{said}; set {KEY} to a key that it takes", reply.status_code)
        if body is not None and reply.status_code in (400, 413, 422):
            if _TOO_LONG.search(reply.text):
                raise _TooLong(_short(_message(reply.text)))
            if "response_format" in body and _SCHEMA.search(reply.text):
                raise _Refused(
                    f"{said}; replies must be held to a JSON schema: choose a server that can", reply.status_code
                )
        raise _Refused(f"{said}; check the URL and the model", reply.status_code)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _answer(value: dict[str, Any], url: str) -> _Answer:
    """The text and the token counts of a chat completion."""
    try:
        text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _Passing(f"{url} answers with no chat completion: {_short(str(value))}") from None
    used = value.get("usage")
    read, generated = (used.get(n) if isinstance(used, dict) else 0 for n in ("prompt_tokens", "completion_tokens"))
    return _Answer(
        text if isinstance(text, str) else "",
        read if isinstance(read, int) else 0,
        generated if isinstance(generated, int) else 0,
    )


def _base(url: str) -> str:
    """The address that paths are added to. Raises GenrecError for what is no plain http(s) URL."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        raise GenrecError("the endpoint is no URL; give one like http://127.0.0.1:8000/v1") from None
    if parts.username or parts.password:
        raise GenrecError(f"put no name or key into the endpoint's URL; set {KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise GenrecError(f"the endpoint {url!r} is no URL of a server; give one like http://127.0.0.1:8000/v1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"


def _message(text: str) -> str:
    """What a server says is wrong: the error message of its JSON, else its text."""
    try:
        value = json.loads(text)
        value = value.get("error", value)
        return str(value.get("message") or value) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError):
        return text


def _short(text: str) -> str:
    return " ".join(text[:2000].split())[:200]


def _seconds(after: str) -> float | None:
    """The seconds that a Retry-After header means, or None."""
    if after.strip().isdecimal():
        return float(after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        return None
