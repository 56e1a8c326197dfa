import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.contracts import UserContext
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, open_store
from genrec.instructions.sqlite_store import SQLiteStore
from serving.llm import Backend, Chat, Scripted
from serving.worker import Budget, Interactions, Worker, WorkerConfig, contexts_of
from tests.serving.test_instruct_job import CATALOG, TEMPLATE, echo

ROOT = Path(__file__).parents[2]


def user(name: str, *items: int, scenario: str = "home") -> UserContext:
    return UserContext(history=items, user=name, scenario=scenario)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1e6) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def worker(
    store: InstructionStore, model: Backend | None = None, clock: Clock | None = None, **settings: object
) -> Worker:
    config = WorkerConfig(**({"window": 3, "chunk": 4} | settings))  # type: ignore[arg-type]
    model = model or Scripted(echo)
    return Worker(CATALOG, TEMPLATE, store, lambda: model, config, report=lambda _: None, clock=clock or Clock())


def asked(model: Scripted) -> list[str]:
    """The last title of every prompt, in the order of the calls."""
    return [call[-1]["content"].split('"')[-2] for call in model.calls]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "s.sqlite"


# -- what is stale ------------------------------------------------------------------------------------


def test_a_window_of_new_events_makes_an_instruction_stale(place: Path) -> None:
    with open_store(place) as store:
        model = Scripted(echo)
        keeper = worker(store, model)
        assert keeper.round([user("a", 1, 2), user("new")]).written == 1
        for history in ((1, 2, 3), (1, 2, 3, 4)):  # two events that it does not know of, of a window of three
            done = keeper.round([user("a", *history), user("new")])
            assert (done.written, done.current, done.empty) == (0, 1, 1)
        assert keeper.round([user("a", 1, 2, 3, 4, 5)]).written == 1
        found = store.get("a", "home")
        assert found is not None and (found.look_for, found.events) == ("like Film 5", 5)
        assert keeper.round([user("a", 1, 2, 3, 4, 5, 6)]).written == 0 and len(model.calls) == 2


def test_each_scenario_has_a_window_of_its_own(place: Path) -> None:
    with open_store(place) as store:
        keeper = worker(store)
        keeper.round([user("a", 1, 2)])
        keeper.round([user("a", 1, 2, 3), replace(user("a", 1, 2, 3, scenario="item"), trigger=3)])
        done = keeper.round([user("a", 1, 2, 3, 4, 5), replace(user("a", 1, 2, 3, 4, 5, scenario="item"), trigger=5)])
        assert (done.written, done.current) == (1, 1)
        found = {(u, s): i.events for u, s, i in store.all()}
        assert found == {("a", "home"): 5, ("a", "item"): 3}


def test_age_prompt_and_history_make_an_instruction_stale(place: Path) -> None:
    clock = Clock()
    with open_store(place) as store:
        worker(store, clock=clock).round([user("a", 1, 2), user("b", 3)])
        clock.now += 100
        assert worker(store, clock=clock, max_age=100).round([user("a", 1, 2), user("b", 3, 4)]).written == 0
        clock.now += 1
        assert worker(store, clock=clock, max_age=100).round([user("a", 1, 2), user("b", 3, 4)]).written == 2
        assert worker(store, clock=clock).round([user("a", 2, 1)]).written == 1  # as many events, but others
        assert worker(store, clock=clock).round([user("a", 1, 2, 3)]).written == 1  # one more, but others before it
        assert worker(store, clock=clock).round([user("a", 2)]).written == 1  # fewer
        other = Worker(
            CATALOG, replace(TEMPLATE, version="other"), store, lambda: Scripted(echo), WorkerConfig(), clock=clock
        )
        assert other.round([user("a", 2, 3)]).written == 1
        found = store.get("a", "home")
        assert found is not None and found.prompt_version == "other"


def test_what_nobody_rewrites_expires(place: Path) -> None:
    clock = Clock()
    with open_store(place) as store:
        worker(store, clock=clock).round([user("gone", 1), user("here", 2)])
        clock.now += 1000
        worker(store, clock=clock, max_age=500, expire=2000).round([user("here", 2)])
        assert store.count() == 2
        clock.now += 1001
        worker(store, clock=clock, max_age=500, expire=2000).round([user("here", 2)])
        assert [name for name, _, _ in store.all()] == ["here"]


def test_the_stalest_come_first(place: Path) -> None:
    clock = Clock()
    with open_store(place) as store:
        worker(store, clock=clock).round([user("old", 7)])
        clock.now += 1
        worker(store, clock=clock).round([user("few", 0), user("many", 1), user("fresh", 2), user("tie", 4)])
        clock.now += 100
        model = Scripted(echo)
        worker(store, model, clock, max_age=50).round(
            [
                user("few", 0, 0, 0, 3),  # 3 that it does not know of
                user("many", 1, 1, 1, 1, 1, 5),  # 5
                user("tie", 4),  # none, but too old
                user("old", 7),  # the same, and older
                user("unknown", 8, 8, 8, 6),  # 4 of which no instruction knows
            ]
        )
        assert asked(model) == [f"Film {n}" for n in (5, 6, 3, 7, 4)]


# -- budget -------------------------------------------------------------------------------------------


def test_the_budget_bounds_an_hour_and_the_stalest_get_it(place: Path) -> None:
    contexts = [user(f"u{n}", *[n % 9] * (n + 1)) for n in range(12)]
    with open_store(place) as store:
        model = Scripted(echo)
        keeper = worker(store, model, tokens=1500)
        hour = Clock(0.0)
        keeper.budget = Budget(1500, hour)
        done = keeper.round(contexts)
        assert 0 < done.written < 12 and done.waiting == 12 - done.written
        assert done.prompt_tokens + done.output_tokens <= 1500
        first = {name for name, _, _ in store.all()}
        assert first == {f"u{n}" for n in range(12 - done.written, 12)}  # the longest unread histories
        written = done.written
        while hour.now <= 7200 and written < 12:
            hour.now += 600
            written += keeper.round(contexts).written
        assert written == 12 and hour.now >= 3600 and len(model.calls) == 12
        assert worker(store).round(contexts).current == 12


def test_a_budget_forgets_after_an_hour() -> None:
    clock = Clock(0.0)
    budget = Budget(100, clock)
    budget.spend(60)
    clock.now = 1800
    budget.spend(30)
    assert budget.left() == 10
    clock.now = 3600
    assert budget.left() == 70
    clock.now = 5400
    assert budget.left() == 100
    assert Budget(None).left() == float("inf")


def test_a_budget_below_one_instruction_is_one_clear_line(place: Path) -> None:
    with open_store(place) as store, pytest.raises(GenrecError, match="tokens is 50; one instruction needs about"):
        worker(store, tokens=50).round([user("a", 1)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 0}, "window is 0"),
        ({"tokens": -1}, "tokens is -1"),
        ({"expire": 5.0}, "shorter than max_age"),
        ({"scenarios": ("hoem",)}, "unknown scenario 'hoem'; there are: home"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(GenrecError, match=said):
        WorkerConfig(**settings)  # type: ignore[arg-type]


# -- failures, other workers, kills -------------------------------------------------------------------


def test_a_server_that_fails_ends_a_round_and_the_next_goes_on(place: Path) -> None:
    class Failing(Scripted):
        broken = True

        def generate(self, chats: list[Chat], schema: object = None, max_tokens: int = 160) -> list[str]:
            if self.broken and len(self.calls) >= 4:
                raise GenrecError("http://h/v1 does not answer")
            return super().generate(chats)

    contexts = [user(f"u{n}", n) for n in range(9)]
    with open_store(place) as store:
        model = Failing(echo)
        keeper = worker(store, model)
        with pytest.raises(GenrecError, match="does not answer"):
            keeper.round(contexts)
        assert store.count() == 4
        with open_store(place) as other:  # nothing stays claimed
            assert len(other.claim([("u8", "home"), ("u4", "home")], 0.001)) == 2
        time.sleep(0.01)
        model.broken = False
        done = keeper.round(contexts)
        assert (done.written, done.current) == (5, 4)
        assert len(model.calls) == 9 and store.count() == 9


def test_a_locked_store_ends_a_round_and_not_the_worker(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, said, rounds = [user(f"u{n}", n) for n in range(9)], [], []
    with SQLiteStore(place, patience=0.01) as store:
        store.put_many(())
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        keeper = worker(store, every=0.01)
        keeper.report = said.append
        monkeypatch.setattr("serving.worker.contexts_of", lambda *_: contexts)

        class Ended(Exception):
            pass

        class Sequences:
            def sequences(self) -> None:
                rounds.append(store.count())
                if len(rounds) == 2:
                    other.execute("COMMIT")
                    other.close()
                if len(rounds) == 3:
                    raise Ended

        with pytest.raises(Ended):
            keeper.run(Sequences())  # type: ignore[arg-type]
        assert rounds == [0, 0, 9]
        failed = [line for line in said if "locked by another process" in line]
        assert len(failed) == 1 and failed[0].endswith("the next round is in 0.01 s")


def test_workers_side_by_side_write_nothing_twice(place: Path) -> None:
    contexts = [user(f"u{n}", n % 9, (n + 1) % 9) for n in range(60)]
    models = [Scripted(lambda chat: (time.sleep(0.001), echo(chat))[1]) for _ in range(3)]
    written: list[int] = []

    def work(model: Scripted) -> None:
        with open_store(place) as store:
            written.append(worker(store, model).round(contexts).written)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_store(place) as store:
        assert store.count() == 60 == sum(written) == sum(len(model.calls) for model in models)
        assert sum(bool(model.calls) for model in models) > 1
        assert worker(store).round(contexts).current == 60


CHILD = """
import json, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from genrec.instructions import open_store
from serving.llm import Scripted
from tests.serving.test_worker import echo, user, worker

log = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def reply(chat):
    time.sleep(0.001)
    return echo(chat)

class Store(type(open_store(sys.argv[2]))):
    def put_many(self, rows):
        rows = list(rows)
        super().put_many(rows)
        os.write(log, "".join(f"{user}\\n" for user, _, _ in rows).encode())

if float(sys.argv[4]):
    threading.Timer(float(sys.argv[4]), os.kill, (os.getpid(), signal.SIGKILL)).start()
with Store(sys.argv[2]) as store:
    done = worker(store, Scripted(reply), chunk=10, lease=0.5).round([user(f"u{n}", n % 9) for n in range(300)])
sys.stdout.write(json.dumps([done.written, done.current, done.elsewhere]))
sys.stdout.flush()
os._exit(0)
"""


def test_killed_workers_lose_nothing_and_write_nothing_twice(place: Path, tmp_path: Path) -> None:
    log = tmp_path / "written"

    def child(seconds: float) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", CHILD, str(ROOT), str(place), str(log), str(seconds)]
        return subprocess.Popen(arguments, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)

    killed = [child(0.05), child(0.15), child(0.1)]  # side by side; the clock starts when each is ready to work
    assert [c.wait(120) for c in killed] == [-signal.SIGKILL] * 3
    before = Counter(log.read_text().split()) if log.exists() else Counter()
    time.sleep(0.6)  # the claims of the dead end
    last = child(0)
    out, _ = last.communicate(timeout=120)
    written, current, elsewhere = json.loads(out)
    assert (written + current, elsewhere) == (300, 0)
    counts = Counter(log.read_text().split())
    assert set(counts.values()) == {1} and len(counts) == len(before) + written
    with open_store(place) as store:
        assert store.count() == 300


# -- interactions -------------------------------------------------------------------------------------


def shop(folder: Path, events: int, items: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    lines = ["user,item,timestamp", *(f"u{n % 3},i{n % items},{1000 + n}" for n in range(events))]
    temporary = folder / ".new"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.rename(folder / "interactions.csv")


def test_interactions_are_read_again_when_they_change(tmp_path: Path) -> None:
    said: list[str] = []
    shop(tmp_path / "shop", 6)
    source = Interactions(str(tmp_path / "shop"), CATALOG, said.append)
    first = source.sequences()
    assert source.sequences() is first and len(said) == 1
    assert contexts_of(first)[1].history == (1, 0)
    shop(tmp_path / "shop", 9)
    assert contexts_of(source.sequences(), ("home", "item"))[2:4] == [
        replace(c, scenario=name, trigger=trigger)
        for c in [contexts_of(source.sequences())[1]]
        for name, trigger in (("home", None), ("item", 3))
    ]
    assert contexts_of(source.sequences())[1].history == (1, 0, 3) and len(said) == 2


def test_users_keep_the_attributes_they_were_fitted_with(tmp_path: Path) -> None:
    """What `genrec instruct` sees too; a user who came later brings those of the file."""
    shop(tmp_path / "shop", 9)
    (tmp_path / "shop" / "users.csv").write_text("user,plan\nu0,paid\nu1,paid\nu2,paid\n")
    live = Interactions(str(tmp_path / "shop"), CATALOG).sequences()
    assert [live.attributes_of(u) for u in range(3)] == [(("plan", "paid"),)] * 3
    fitted = replace(live, users=["u0", "u1", "old"], attributes=[(("plan", "free"),), (), ()])
    found = Interactions(str(tmp_path / "shop"), CATALOG, fitted=fitted).sequences()
    assert [c.attributes for c in contexts_of(found)] == [(("plan", "free"),), (), (("plan", "paid"),)]


def test_items_that_the_bundle_does_not_know_are_left_out_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    shop(tmp_path / "shop", 24, items=12)
    found = Interactions(str(tmp_path / "shop"), CATALOG, said.append).sequences()
    assert "6 events of items that the bundle does not know are left out" in said[0]
    assert [c.history for c in contexts_of(found)] == [(0, 3, 6, 0, 3, 6), (1, 4, 7, 1, 4, 7), (2, 5, 8, 2, 5, 8)]


def test_a_file_caught_half_written_costs_one_round(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop(tmp_path / "shop", 6)
    said: list[str] = []
    rounds: list[float] = []

    def sleep(seconds: float) -> None:  # between the rounds
        rounds.append(seconds)
        if len(rounds) == 1:
            with (tmp_path / "shop" / "interactions.csv").open("a") as f:
                f.write("u0,i1,1006\nu1,i")
        if len(rounds) == 2:
            shop(tmp_path / "shop", 15)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    with open_store(place) as store:
        keeper = worker(store)
        keeper.report = said.append
        with pytest.raises(KeyboardInterrupt):
            keeper.run(Interactions(str(tmp_path / "shop"), CATALOG, said.append))
        assert [i.events for _, _, i in store.all()] == [5, 5, 5]
    assert any("interactions.csv" in line and "the next round is in 300 s" in line for line in said)
    assert all(250 < seconds <= 300 for seconds in rounds)
