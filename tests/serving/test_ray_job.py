"""The same job on a local Ray with real workers, one of them killed."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tests_support import watch_writes

import prompts
from genrec.contracts import Instruction, UserContext
from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, PromptWriter, open_store
from genrec.instructions.schema import violation
from serving.instruct import instruct
from serving.llm import Chat, Scripted
from serving.llm.base import generate_fitting
from serving.ray_job import Actors, ray_instruct, start

TEMPLATE = prompts.load("intent_v2")
CATALOG = Catalog(
    pa.table(
        {
            "item": [f"i{n}" for n in range(40)],
            "title": [f"Film {n}" for n in range(40)],
            "category": [[f"Kind {n % 7}"] for n in range(40)],
        }
    )
)
VALID = '{"situation": "s", "intents": ["i"], "look_for": "l"}'
USERS = 1000
CONTEXTS = [UserContext(history=tuple((u * 7 + n * n) % 40 for n in range(u % 6)), user=f"u{u}") for u in range(USERS)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start(cpus=2)
    yield
    ray.shutdown()


def reply(chat: Chat) -> str:
    """Some are invalid at first, some for ever."""
    text = chat[-1]["content"]
    digest = hashlib.sha256(text.split("\n")[1].encode()).hexdigest()
    if digest[0] == "0" or (digest[0] == "1" and "Answer with the JSON" not in text):
        return "no JSON"
    return json.dumps({"situation": digest[:9], "intents": [digest[9:19]], "look_for": digest[19:39]})


class Counted(Scripted):
    """Notes every call in a folder, as process and number, and dies once, in the middle of a shard."""

    def __init__(self, folder: Path, dies: bool = False) -> None:
        super().__init__(reply)
        self.folder, self.dies = folder, dies

    def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
        time.sleep(0.05)  # so that no worker is done before the other has started
        texts = super().generate(chats)
        (self.folder / f"{os.getpid()}-{len(self.calls)}").touch()
        if self.dies and len(self.calls) > 100:
            try:
                (self.folder / "killed").touch(exist_ok=False)
            except FileExistsError:
                return texts
            os.kill(os.getpid(), signal.SIGKILL)
        return texts


def run(
    store: InstructionStore, model: Callable[[], Scripted], work: Path, workers: int = 1, **settings: object
) -> object:
    engine = Actors(model, "scripted", workers)
    settings = {"shard": 50, "clock": lambda: 7.0} | settings
    return ray_instruct(CONTEXTS, PromptWriter(CATALOG, TEMPLATE), store, engine, work, **settings)  # type: ignore[arg-type]


def content(store: InstructionStore) -> list[tuple[str, str, Instruction]]:
    return [(user, scenario, replace(i, created=0.0)) for user, scenario, i in store.all()]


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    calls, lines = tmp_path / "calls", []
    calls.mkdir()
    with open_store(tmp_path / "plain.sqlite") as plain, open_store(tmp_path / "ray.sqlite") as store:
        expected = instruct(CONTEXTS, CATALOG, Scripted(reply), TEMPLATE, plain)
        put = watch_writes(store)
        begun = time.monotonic()
        done = run(store, lambda: Counted(calls, dies=True), tmp_path / "work", workers=2, report=lines.append)
        seconds = time.monotonic() - begun
        assert content(store) == content(plain)
        for name in ("asked", "written", "empty", "retried", "replaced", "output_tokens"):
            assert getattr(done, name) == getattr(expected, name), name
        assert len(put) == len(set(put)) == expected.written  # none lost, none twice
        for _, _, i in store.all():
            value = {"situation": i.situation, "intents": list(i.intents), "look_for": i.look_for}
            assert violation(value, TEMPLATE.schema) is None
        processes = {path.name.split("-")[0] for path in calls.iterdir()} - {"killed"}
        assert (calls / "killed").exists() and len(processes) >= 3  # two workers and one in the dead one's place
        assert lines[-1].startswith(f"instructions: {USERS:,} of {USERS:,},") and "tokens/s" in lines[-1]
        assert len(lines) > 10
        print(f"{expected.written} instructions by {len(processes)} workers, one of them killed, in {seconds:.1f} s")


def test_a_driver_that_is_stopped_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []

    def stop_after_two(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with open_store(tmp_path / "ray.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            run(store, lambda: Scripted(lambda _: VALID), tmp_path / "work", report=stop_after_two)
        before = store.count()
        assert 0 < before < 500
        (tmp_path / "work" / "part-999999.parquet").write_text("left by somebody, or half written")
        done = run(store, lambda: Scripted(lambda _: VALID), tmp_path / "work", report=lines.append)
        assert getattr(done, "current", None) == before
        with open_store(tmp_path / "plain.sqlite") as plain:
            instruct(CONTEXTS, CATALOG, Scripted(lambda _: VALID), TEMPLATE, plain)
            assert content(store) == content(plain)


class Narrow(Scripted):
    """A model that takes short prompts only."""

    def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
        return generate_fitting(chats, [len(chat[-1]["content"]) for chat in chats], 85, self.name, super().generate)


def test_prompts_that_do_not_fit_and_engines_that_fail(tmp_path: Path) -> None:
    few = CONTEXTS[:60]
    writer = PromptWriter(CATALOG, TEMPLATE)
    with open_store(tmp_path / "ray.sqlite") as store:
        done = ray_instruct(
            few, writer, store, Actors(lambda: Narrow(lambda _: VALID), "narrow", 1), tmp_path / "work", shard=30
        )
        assert (done.written, done.empty) == (50, 10) and 0 < done.replaced < 50
        assert {i.model for _, _, i in store.all()} == {"narrow", "template"}
        shard = pq.read_table(tmp_path / "work" / "part-000000.parquet")
        assert shard.column_names == ["user", "scenario", "chat", "tokens", "max_tokens"]

        def down() -> Scripted:
            raise GenrecError("http://h/v1 does not answer")

        with pytest.raises(
            GenrecError, match=r"a Ray worker failed \(.*does not answer.*the same command goes on"
        ) as caught:
            run(store, down, tmp_path / "work")
        assert "\n" not in str(caught.value) and store.count() == 50
