"""Ray Data's vLLM processor with the real packaged model: two engines on a local Ray, one of them killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import ray
from tests_support import watch_writes

import prompts
from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.instructions import PromptWriter, open_store
from genrec.instructions.schema import violation
from serving.ray_job import Processor, ray_instruct, start

pytestmark = pytest.mark.real

KINDS = ("Horror", "Romance", "Comedy", "Western")
CATALOG = Catalog(
    pa.table(
        {
            "item": [f"i{n}" for n in range(40)],
            "title": [f"Film {n} ({1950 + n})" for n in range(40)],
            "category": [[KINDS[n % 4]] for n in range(40)],
        }
    )
)
TEMPLATE = prompts.load("intent_v2")
USERS, SHARD = 16, 4
CONTEXTS = [UserContext(history=((7 * u) % 40, (11 * u + 3) % 40), user=f"u{u}") for u in range(USERS)]


@pytest.fixture
def cluster() -> Iterator[None]:
    start(cpus=2)
    yield
    ray.shutdown()


def engines() -> list[psutil.Process]:
    """Ray's workers that hold an engine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "vLLMEngineStage" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_an_engine_that_is_killed_loses_nothing(cluster: None, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_: str) -> None:
        if not killed and (there := engines()):
            killed.append(there[0].pid)
            os.kill(there[0].pid, signal.SIGKILL)

    with open_store(tmp_path / "ray.sqlite") as store:
        put = watch_writes(store)
        writer = PromptWriter(CATALOG, TEMPLATE)
        done = ray_instruct(CONTEXTS, writer, store, Processor(workers=2), tmp_path / "work", report=kill, shard=SHARD)
        found = {user: i for user, _, i in store.all()}
    assert killed
    assert (done.written, done.replaced) == (USERS, 0)
    assert sorted(put) == sorted(found) == sorted(c.user for c in CONTEXTS if c.user)  # none lost, none twice
    for i in found.values():
        value = {"situation": i.situation, "intents": list(i.intents), "look_for": i.look_for}
        assert violation(value, TEMPLATE.schema) is None
    assert {i.model for i in found.values()} == {"smollm2-135m-instruct"}
    assert len({i.look_for for i in found.values()}) > 4
    assert done.output_tokens > USERS * 15 and done.prompt_tokens > USERS * 250
