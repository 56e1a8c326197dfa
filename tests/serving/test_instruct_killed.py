"""1,000 instructions by a batch job that is killed with SIGKILL at random moments and started again: the same store
as without a kill. `pytest -s` prints the figures."""

import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import prompts
from genrec.contracts import Instruction
from genrec.instructions.schema import violation
from genrec.instructions.sqlite_store import SQLiteStore

ROOT = Path(__file__).parents[2]
USERS, CHUNK = 1000, 50
CHILD = """
import hashlib, json, os, signal, sys, threading, time
from pathlib import Path
import pyarrow as pa
import prompts
from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.instructions.sqlite_store import SQLiteStore
from serving.instruct import instruct
from serving.llm import Scripted

path, moment, at, users, chunk = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
log = os.open(path + ".calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
passed = dict.fromkeys(("generate", "row", "chunk"), 0)

def pass_by(where):
    passed[where] += 1
    if where == moment and passed[where] == at:
        os.kill(os.getpid(), signal.SIGKILL)

def reply(chat):
    pass_by("generate")
    os.write(log, b".")
    time.sleep(0.0005)
    chosen = chat[-1]["content"].split("\\n")[1]
    digest = hashlib.sha256(chosen.encode()).hexdigest()
    if digest[0] in "01":  # for the reminder too
        return "no JSON"
    return json.dumps({"situation": digest[:9], "intents": [digest[9:19]], "look_for": digest[19:39]})

class Store(SQLiteStore):
    def put_many(self, rows):
        def watched():
            for row in rows:
                yield row
                pass_by("row")
        super().put_many(watched())

rows = range(40)
catalog = Catalog(pa.table({"item": [f"i{n}" for n in rows], "title": [f"Film {n}" for n in rows],
                            "category": [[f"Kind {n % 7}"] for n in rows]}))
contexts = [UserContext(history=tuple((u * 7 + n * n) % 40 for n in range(1 + u % 5)), user=f"u{u}")
            for u in range(users)]
if moment == "timer":
    threading.Timer(at / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
with Store(Path(path)) as store:
    done = instruct(contexts, catalog, Scripted(reply), prompts.load("intent_v2"), store, chunk=chunk,
                    report=lambda line: pass_by("chunk"))
sys.stdout.write(json.dumps([done.asked, done.written, done.current, len(catalog.items)]))
sys.stdout.flush()
os._exit(0)
"""


def child(path: Path, moment: str = "never", at: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [str(path), moment, str(at), str(USERS), str(CHUNK)]
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def content(path: Path) -> list[tuple[str, str, Instruction]]:
    with SQLiteStore(path) as store:
        return [(user, scenario, replace(i, created=0.0)) for user, scenario, i in store.all()]


def test_a_killed_and_restarted_job_gives_the_same_result(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.sqlite", tmp_path / "killed.sqlite"
    assert child(whole).returncode == 0
    expected = content(whole)
    assert len(expected) == USERS and {i.model for _, _, i in expected} == {"scripted", "template"}
    schema = prompts.load("intent_v2").schema
    values = ({"situation": i.situation, "intents": list(i.intents), "look_for": i.look_for} for _, _, i in expected)
    assert [value for value in values if violation(value, schema)] == []

    draw = random.Random()
    moments = [
        ("generate", draw.randint(1, CHUNK)),  # before anything is there
        ("row", draw.randint(1, CHUNK)),  # inside a transaction
        ("chunk", draw.randint(1, 4)),  # right after a commit
        ("row", draw.randint(CHUNK + 1, 4 * CHUNK)),
        ("timer", draw.randint(1, 400)),  # anywhere; it may also be over by then
        ("generate", draw.randint(1, 4 * CHUNK)),
        ("chunk", draw.randint(1, 4)),
    ]
    before = kills = 0
    for moment, at in moments:
        ended = child(killed, moment, at)
        if ended.returncode == 0 and moment == "timer":
            before = USERS
            break
        kills += 1
        assert ended.returncode == -signal.SIGKILL, (moment, at, ended.stderr)
        found = content(killed) if killed.is_file() and killed.stat().st_size else []
        assert len(found) % CHUNK == 0 and len(found) >= before, (moment, at)  # whole chunks, none lost
        assert set(found) <= set(expected), (moment, at)
        before = len(found)
    last = child(killed)
    assert last.returncode == 0, last.stderr
    assert last.stdout == f"[{USERS}, {USERS - before}, {before}, 40]"  # none written twice
    assert content(killed) == expected
    calls, needed = (Path(f"{path}.calls").stat().st_size for path in (killed, whole))
    print(f"{USERS} instructions, {kills} kills, {calls} calls of the model where {needed} are needed")
    assert needed <= calls <= needed + kills * 2 * CHUNK  # a kill costs its own chunk at most, with second tries
