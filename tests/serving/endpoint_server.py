"""An OpenAI-compatible server on this machine that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], str]  # status, headers, body
Script = Callable[["Server", dict[str, Any]], "Reply | None"]  # None cuts the connection


class Server:
    """models: what /models lists, as (name, owner). calls: the bodies of all chat requests, in the order they came.
    most: how many were under way at once. script(server, body) answers a chat request."""

    def __init__(self, script: Script, models: tuple[tuple[str, str], ...] = (("tiny", "test"),)) -> None:
        self.script, self.models = script, models
        self.calls: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.url = ""

    def seen(self, body: dict[str, Any]) -> int:
        """How often this very chat has been asked so far, this time included."""
        with self.lock:
            return sum(call["messages"] == body["messages"] for call in self.calls)


def completion(text: object, prompt_tokens: int = 10, output_tokens: int = 3) -> Reply:
    used = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": used})


def error(status: int, message: str = "busy", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}})


@contextlib.contextmanager
def serving(script: Script, **settings: Any) -> Iterator[Server]:
    """The server, while it runs."""
    server = Server(script, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, headers: dict[str, str], body: str) -> None:
            data = body.encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            entries = [{"id": name, "owned_by": owner} for name, owner in server.models]
            known = self.path == "/v1/models" and entries
            self.answer(*((200, {}, json.dumps({"data": entries})) if known else error(404, "no such page")))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.calls.append(body)
                server.headers.append(dict(self.headers))
                server.under_way += 1
                server.most = max(server.most, server.under_way)
            try:
                reply = server.script(server, body)
                if reply is None:
                    self.close_connection = True
                    self.connection.shutdown(2)
                else:
                    self.answer(*reply)
            except OSError:
                self.close_connection = True  # the client went away
            finally:
                with server.lock:
                    server.under_way -= 1

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: object) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def slow(seconds: float, reply: Reply) -> Reply:
    time.sleep(seconds)
    return reply
