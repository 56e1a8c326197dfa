"""Instructions in Redis or Valkey, for writers and readers on many hosts.

    redis://[user:password@]host[:port][/db]?prefix=NAME      also rediss:// (TLS), valkey://, valkeys://

NAME keeps several bundles apart on one server. Keys: genrec:NAME:instructions, a hash with a field per user and
scenario and the instruction as JSON; genrec:NAME:created, the same fields sorted by time; genrec:NAME:claim:FIELD.
A chunk is one MULTI. A request that finds the server down waits at most a few seconds; a writer has more patience.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from genrec.contracts import Instruction
from genrec.errors import GenrecError, missing_package
from genrec.instructions.store import QUERY, SERVERS, InstructionStore, Key, Row

T = TypeVar("T")
PART = 1000  # fields of one command
# Deletes up to ARGV[2] fields created before ARGV[1]; a field that is written anew meanwhile stays, as this is atomic.
_EXPIRE = """local old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[1], 'LIMIT', 0, ARGV[2])
if #old > 0 then redis.call('HDEL', KEYS[1], unpack(old)); redis.call('ZREM', KEYS[2], unpack(old)) end
return #old"""


class RedisStore(InstructionStore):
    """See InstructionStore. url: as above. timeout: seconds for one command. patience: seconds for which a write is
    repeated while the server cannot be reached. The password never appears in a message."""

    def __init__(self, url: str, timeout: float = 2.0, patience: float = 30.0) -> None:
        try:
            import redis
        except ImportError:
            raise missing_package("redis (the client of Redis and Valkey)", "redis") from None
        address, prefix, self.place = _parse(url)
        self.patience = patience
        self._redis: Any = redis
        try:
            self._client: Any = redis.Redis.from_url(
                address,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                decode_responses=True,
                encoding_errors="replace",
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1),  # the server may have closed an idle connection
            )
        except ValueError as error:
            raise GenrecError(f"{self.place}: {error}") from None
        self._hash, self._times = f"genrec:{prefix}:instructions", f"genrec:{prefix}:created"
        self._claims = f"genrec:{prefix}:claim:"

    def get_many(self, keys: Sequence[Key]) -> list[Instruction | None]:
        fields = [_field(key) for key in keys]
        found: list[str | None] = []
        for start in range(0, len(fields), PART):
            part = fields[start : start + PART]
            found += self._ask(functools.partial(self._client.hmget, self._hash, part))
        return [None if value is None else self._instruction(value) for value in found]

    def put_many(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        put = {_field((user, scenario)): i for user, scenario, i in rows}
        ageing = {_field((user, scenario)): i.created for user, scenario, i in rows if scenario != QUERY}

        def write() -> None:
            with self._client.pipeline(transaction=True) as chunk:
                chunk.hset(self._hash, mapping={field: _json(i) for field, i in put.items()})
                if ageing:
                    chunk.zadd(self._times, ageing)
                chunk.delete(*(self._claims + field for field in put))
                chunk.execute()

        self._ask(write if put else self._client.ping, self.patience)

    def expire(self, before: float) -> int:
        script, expired = self._client.register_script(_EXPIRE), 0
        while n := int(self._ask(lambda: script([self._hash, self._times], [repr(before), PART]), self.patience)):
            expired += n
        return expired

    def claim(self, keys: Sequence[Key], seconds: float) -> list[Key]:
        def write() -> list[Any]:
            with self._client.pipeline(transaction=False) as each:
                for key in keys:
                    each.set(self._claims + _field(key), 1, nx=True, px=max(1, round(1000 * seconds)))
                return list(each.execute())

        return [key for key, mine in zip(keys, self._ask(write) if keys else [], strict=True) if mine]

    def release(self, keys: Sequence[Key]) -> None:
        if keys:
            self._ask(lambda: self._client.delete(*(self._claims + _field(key) for key in keys)))

    def count(self) -> int:
        return int(self._ask(lambda: self._client.hlen(self._hash)))

    def all(self) -> list[Row]:
        def read() -> dict[str, str]:
            return dict(self._client.hscan_iter(self._hash, count=PART))

        rows = ((*self._key(field), self._instruction(value)) for field, value in self._ask(read).items())
        return sorted(rows, key=lambda row: row[:2])

    def close(self) -> None:
        """Ends the connections; a later call opens new ones."""
        self._client.close()

    def _ask(self, work: Callable[[], T], patience: float = 0.0) -> T:
        """Runs one command, repeated for `patience` seconds while the server cannot be reached; one clear line for
        what may go wrong. Every command here may be repeated without harm."""
        errors, begun, pause = self._redis.exceptions, time.monotonic(), 0.1
        while True:
            try:
                return work()
            except (errors.AuthenticationError, errors.AuthorizationError) as error:
                raise GenrecError(f"{self.place} refuses the user or password ({_line(error)})") from None
            except (errors.ConnectionError, errors.TimeoutError) as error:
                if time.monotonic() - begun + pause > patience:
                    raise GenrecError(f"{self.place} cannot be reached ({_line(error)}); is the server up?") from None
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
            except errors.RedisError as error:
                raise GenrecError(f"{self.place} refuses: {_line(error)}") from None

    def _key(self, field: str) -> Key:
        try:
            user, scenario = json.loads(field)
            return str(user), str(scenario)
        except (ValueError, TypeError):
            raise self._damaged(f"the field {field[:80]!r}") from None

    def _instruction(self, value: str) -> Instruction:
        try:
            return _instruction(json.loads(value))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise self._damaged(f"the value {value[:80]!r}") from None

    def _damaged(self, what: str) -> GenrecError:
        return GenrecError(
            f"{self.place} holds {what}, which is no instruction; delete {self._hash} and write it again"
        )


def _parse(url: str) -> tuple[str, str, str]:
    """(address for the client, prefix, address without password for messages)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise GenrecError("the store's URL is not valid; give one like redis://host:6379/0?prefix=shop") from None
    query = parse_qs(parts.query)
    prefix = "".join(query.pop("prefix", []))
    shown = f"{parts.scheme}://{host or ''}{f':{port}' if port else ''}{parts.path}"
    if parts.scheme not in SERVERS or not host:
        raise GenrecError(f"{shown} is no store; give a URL like redis://host:6379/0?prefix=shop")
    if not prefix.strip() or ":" in prefix:
        raise GenrecError(f"{shown}: add ?prefix=NAME; the name keeps bundles apart that share a server")
    scheme = "rediss" if parts.scheme in ("rediss", "valkeys") else "redis"
    address = urlunsplit((scheme, parts.netloc, parts.path, urlencode(query, doseq=True), ""))
    return address, prefix, f"{shown}?prefix={prefix}"


def _field(key: Key) -> str:
    return json.dumps(key)


def _json(instruction: Instruction) -> str:
    return json.dumps(dataclasses.asdict(instruction), allow_nan=False)


def _instruction(value: Mapping[str, Any]) -> Instruction:
    """Raises ValueError, TypeError or KeyError for what is none; fields of a later genrec are left aside."""
    texts = {name: value[name] for name in ("situation", "look_for", "rationale", "model", "prompt_version")}
    texts["context_hash"] = value["context_hash"]
    if not all(isinstance(v, str) for v in (*texts.values(), *value["intents"])):
        raise TypeError
    return Instruction(
        **texts, intents=tuple(value["intents"]), created=float(value["created"]), events=int(value["events"])
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
