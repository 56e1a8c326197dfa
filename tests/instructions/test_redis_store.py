"""The Redis store against a real redis-server, started here on a free port with an empty memory."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, open_store
from genrec.instructions.redis_store import RedisStore
from tests.instructions.store_contract import StoreContract, instruction

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(port: int, folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    """A redis-server that keeps nothing on disk."""
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            time.sleep(0.02)
    raise AssertionError("redis-server did not start")


def stop(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    chosen = free_port()
    server = start(chosen, tmp_path_factory.mktemp("redis"))
    yield chosen
    stop(server)


@pytest.fixture
def place(port: int, request: pytest.FixtureRequest) -> Iterator[str]:
    yield f"redis://127.0.0.1:{port}/0?prefix=shop"
    redis.Redis(port=port).flushall()


class TestRedis(StoreContract):
    def open(self, place: str) -> InstructionStore:
        store = open_store(place)
        assert isinstance(store, RedisStore)
        return store


def test_names_and_databases_keep_bundles_apart(place: str, port: int) -> None:
    with open_store(place) as store:
        store.put_many([("u", "home", instruction(1))])
        for other in (place.replace("shop", "films"), place.replace("/0", "/1")):
            assert open_store(other).get("u", "home") is None and open_store(other).claim([("u", "home")], 9)
        assert open_store(place.replace("redis://", "valkey://")).get("u", "home") == instruction(1)


def test_a_chunk_is_one_transaction(place: str, port: int) -> None:
    with redis.Redis(port=port).monitor() as watched, open_store(place) as store:
        store.claim([("a", "home")], 9)
        store.put_many([("a", "home", instruction(1)), ("b", "home", instruction(2))])
        said = []
        for command in watched.listen():
            said.append(command["command"].split()[0])
            if said[-1] == "EXEC":
                break
    assert said[said.index("MULTI") :] == ["MULTI", "HSET", "ZADD", "DEL", "EXEC"]


def test_a_writer_waits_for_a_server_that_comes_back(tmp_path: Path) -> None:
    port = free_port()
    store = RedisStore(f"redis://127.0.0.1:{port}/0?prefix=shop")
    begun: list[subprocess.Popen[bytes]] = []
    timer = threading.Timer(0.4, lambda: begun.append(start(port, tmp_path)))
    timer.start()
    try:
        store.put_many([("u", "home", instruction(1))])
        assert store.get("u", "home") == instruction(1)
        timer.join()
        stop(begun.pop())
        with pytest.raises(GenrecError, match="cannot be reached"):  # a reader does not wait
            store.get("u", "home")
        begun.append(start(port, tmp_path))
        assert store.get("u", "home") is None  # connections of the old server are no harm
    finally:
        timer.join()
        for server in begun:
            stop(server)


def one_line(caught: pytest.ExceptionInfo[GenrecError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_down_is_one_clear_line() -> None:
    port = free_port()
    store = RedisStore(f"redis://me:secret@127.0.0.1:{port}/0?prefix=shop", patience=0.2)
    for ask in (lambda: store.get("u", "home"), lambda: store.put_many([("u", "home", instruction(1))]), store.count):
        with pytest.raises(GenrecError, match="is the server up") as caught:
            ask()
        assert f"redis://127.0.0.1:{port}/0?prefix=shop" in one_line(caught) and "secret" not in one_line(caught)


def test_a_silent_server_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore(f"redis://127.0.0.1:{silent.getsockname()[1]}/0?prefix=shop", timeout=0.1)
        begun = time.monotonic()
        with pytest.raises(GenrecError, match="cannot be reached"):
            store.get("u", "home")
        assert time.monotonic() - begun < 1


def test_passwords(tmp_path: Path) -> None:
    port = free_port()
    server = start(port, tmp_path, "--requirepass", "secret")
    try:
        with open_store(f"redis://:secret@127.0.0.1:{port}/0?prefix=shop") as store:
            store.put_many([("u", "home", instruction(1))])
        for url in (f"redis://127.0.0.1:{port}/0?prefix=shop", f"redis://:wrong@127.0.0.1:{port}/0?prefix=shop"):
            with pytest.raises(GenrecError, match="refuses") as caught:
                open_store(url).count()
            assert "wrong" not in one_line(caught).replace("WRONGPASS", "")
    finally:
        stop(server)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://127.0.0.1/0", r"add \?prefix=NAME"),
        ("redis://:secret@127.0.0.1/0", r"add \?prefix=NAME"),
        ("redis://127.0.0.1/0?prefix=a:b", r"add \?prefix=NAME"),
        ("redis://?prefix=a", "is no store"),
        ("redis://h:port/0?prefix=a", "not valid"),
        ("redis://h/0?prefix=a&socket_timeout=x", "redis://h/0"),
    ],
)
def test_what_is_no_address_is_one_clear_line(url: str, said: str) -> None:
    with pytest.raises(GenrecError, match=said) as caught:
        open_store(url)
    assert "secret" not in one_line(caught)


def test_damage_is_one_clear_line(place: str, port: int) -> None:
    client = redis.Redis(port=port)
    good = json.dumps({"situation": "s"})
    for value in (b"\xff", b"no JSON", b"[]", good.encode(), json.dumps({"intents": [1]}).encode()):
        client.hset("genrec:shop:instructions", '["u", "home"]', value)
        for ask in (lambda s: s.get("u", "home"), lambda s: s.all()):
            with pytest.raises(GenrecError, match="is no instruction") as caught:
                ask(open_store(place))
            one_line(caught)
    client.set("genrec:shop:instructions", "another's value")
    with pytest.raises(GenrecError, match="refuses: WRONGTYPE"):
        open_store(place).count()


KILLED = """
import os, signal, sys, threading
from genrec.contracts import Instruction
from genrec.instructions import open_store
store, n = open_store(sys.argv[1]), 0
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
while True:
    store.put_many([(f"u{n}-{k}", "home", Instruction("s", ("i",), f"l{n}", created=1.0)) for k in range(50)])
    n += 1
"""


def test_a_killed_writer_leaves_whole_chunks(place: str) -> None:
    for seconds in (0.05, 0.13):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, place, str(seconds)], cwd=ROOT, env=os.environ, timeout=60, check=False
        )
        assert done.returncode == -signal.SIGKILL
    with open_store(place) as store:
        rows = store.all()
        assert len(rows) % 50 == 0 and len(rows) > 0
        assert store.expire(before=2.0) == len(rows) and store.count() == 0
