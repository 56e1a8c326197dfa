"""What every instruction store must do; each store's test file runs these over its own kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from genrec.contracts import Instruction
from genrec.instructions import InstructionStore
from genrec.instructions.store import Row, query_key


def instruction(n: int, created: float = 0.0, events: int = 0) -> Instruction:
    intents = (f"intent {n}", 'ümlaut "quoted"')
    return Instruction(f"situation {n}", intents, f"look for {n}", "why", "m", "p+1", f"h{n}", created, events)


class StoreContract:
    """A fixture `place` gives where one store is; `open` opens it, as another process would."""

    def open(self, place: str) -> InstructionStore:
        raise NotImplementedError

    @pytest.fixture
    def store(self, place: str) -> Iterator[InstructionStore]:
        with self.open(place) as opened:
            yield opened

    def test_what_is_put_comes_back_and_is_replaced(self, place: str, store: InstructionStore) -> None:
        odd = 'a/b:*?[x] "quoted" \n ü'
        store.put_many(
            [("u1", "home", instruction(1, 12.5, 7)), ("u1", "item", instruction(2)), (odd, "home", instruction(4))]
        )
        assert store.get("u1", "home") == instruction(1, 12.5, 7)
        assert store.get("u1", "search") is None and store.get("u2", "home") is None
        asked = [("u1", "item"), ("nobody", "home"), (odd, "home"), ("u1", "home")]
        assert store.get_many(asked) == [instruction(2), None, instruction(4), instruction(1, 12.5, 7)]
        assert store.get_many([]) == []
        store.put_many([("u1", "home", instruction(3))])
        assert store.get("u1", "home") == instruction(3) and store.count() == 3
        expected = [(odd, "home", instruction(4)), ("u1", "home", instruction(3)), ("u1", "item", instruction(2))]
        assert store.all() == expected
        with self.open(place) as other:
            assert other.all() == expected

    def test_reading_makes_nothing(self, store: InstructionStore) -> None:
        assert store.get("u", "home") is None and store.count() == 0 and store.all() == []
        assert store.stale({("u", "home"): "h"}) == [("u", "home")] and store.expire(before=9e9) == 0

    def test_stale_is_missing_or_of_another_hash_in_order(self, store: InstructionStore) -> None:
        store.put_many([(f"u{n}", "home", instruction(n)) for n in range(4)])
        now = {("u9", "home"): "h9", ("u3", "home"): "new", ("u1", "home"): "h1", ("u0", "item"): "h0"}
        assert store.stale(now) == [("u9", "home"), ("u3", "home"), ("u0", "item")]
        assert store.stale({}) == []

    def test_expire(self, store: InstructionStore) -> None:
        store.put_many([(f"u{n}", "home", instruction(n, float(n))) for n in range(5)])
        store.put_many([("u1", "home", instruction(1, 9.0))])  # written anew: its time is the new one
        assert store.expire(before=3.0) == 2
        assert [user for user, _, _ in store.all()] == ["u1", "u3", "u4"]
        assert store.expire(before=3.0) == 0
        assert store.get("u2", "home") is None and store.count() == 3
        store.put_many([(*query_key("Green  Tea"), instruction(7, 0.5)), ("u7", "home", instruction(7, 0.5))])
        assert store.expire(before=1.0) == 1  # what a text means does not age
        assert store.get(*query_key("green tea")) == instruction(7, 0.5) and store.count() == 4

    def test_many_at_once(self, store: InstructionStore) -> None:
        rows = [(f"u{n:05}", "home", instruction(n, float(n))) for n in range(2500)]
        store.put_many(rows)
        assert store.get_many([(user, "home") for user, _, _ in rows]) == [i for _, _, i in rows]
        assert store.all() == rows
        assert store.expire(before=2400.0) == 2400 and store.count() == 100

    def test_a_chunk_is_whole_or_absent(self, store: InstructionStore) -> None:
        def rows() -> Iterator[Row]:
            yield "a", "home", instruction(1)
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            store.put_many(rows())
        assert store.count() == 0
        store.put_many([("a", "home", instruction(1))])
        assert store.count() == 1

    def test_a_claim_is_one_writers(self, place: str, store: InstructionStore) -> None:
        a, b, c = ("a", "home"), ("b", "home"), ("c", "item")
        with self.open(place) as other:
            assert store.claim([a, b], 60) == [a, b]
            assert other.claim([c, b, a], 60) == [c]
            assert store.claim([a, c], 60) == []
            store.release([a])
            assert other.claim([a, b], 60) == [a]
            store.put_many([(*b, instruction(1))])  # what is written needs no claim any more
            assert other.claim([b], 60) == [b]
            assert store.claim([], 60) == [] and store.count() == 1
            store.release([])

    def test_a_dead_writers_claim_ends(self, place: str, store: InstructionStore) -> None:
        with self.open(place) as dead:
            assert dead.claim([("a", "home")], 0.2) == [("a", "home")]
        assert store.claim([("a", "home")], 60) == []
        time.sleep(0.25)
        assert store.claim([("a", "home")], 60) == [("a", "home")]

    def test_one_object_serves_many_threads(self, store: InstructionStore) -> None:
        failed: list[Exception] = []

        def work(t: int) -> None:
            try:
                for n in range(20):
                    store.put_many([(f"u{t}.{n}", "home", instruction(n))])
                    assert store.get(f"u{t}.{n}", "home") == instruction(n)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == [] and store.count() == 80

    def test_closing_twice_is_no_harm(self, place: str) -> None:
        store = self.open(place)
        store.put_many(())
        store.close()
        store.close()
