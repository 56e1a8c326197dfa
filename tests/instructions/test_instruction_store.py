import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrec.contracts import Instruction
from genrec.errors import GenrecError
from genrec.instructions.store import InstructionStore


def instruction(n: int, created: float = 0.0) -> Instruction:
    return Instruction(
        f"situation {n}", (f"intent {n}", 'ümlaut "quoted"'), f"look for {n}", "why", "m", "p+1", f"h{n}", created
    )


def test_what_is_put_comes_back_and_is_replaced(tmp_path: Path) -> None:
    with InstructionStore(tmp_path / "deep" / "s.sqlite") as store:
        store.put_many([("u1", "home", instruction(1, 12.5)), ("u1", "item", instruction(2))])
        assert store.get("u1", "home") == instruction(1, 12.5)
        assert store.get("u1", "item") == instruction(2)
        assert store.get("u1", "search") is None and store.get("u2", "home") is None
        store.put_many([("u1", "home", instruction(3))])
        assert store.get("u1", "home") == instruction(3) and store.count() == 2
        assert store.all() == [("u1", "home", instruction(3)), ("u1", "item", instruction(2))]
    with InstructionStore(tmp_path / "deep" / "s.sqlite", create=False) as store:
        assert store.count() == 2
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.sqlite"]  # no log left once it is closed


def test_stale_is_missing_or_of_another_hash_in_order(tmp_path: Path) -> None:
    with InstructionStore(tmp_path / "s.sqlite") as store:
        store.put_many([(f"u{n}", "home", instruction(n)) for n in range(4)])
        now = {("u9", "home"): "h9", ("u3", "home"): "new", ("u1", "home"): "h1", ("u0", "item"): "h0"}
        assert store.stale(now) == [("u9", "home"), ("u3", "home"), ("u0", "item")]
        assert store.stale({}) == []


def test_expire(tmp_path: Path) -> None:
    with InstructionStore(tmp_path / "s.sqlite") as store:
        store.put_many([(f"u{n}", "home", instruction(n, float(n))) for n in range(5)])
        assert store.expire(before=3.0) == 3
        assert [user for user, _, _ in store.all()] == ["u3", "u4"]
        assert store.expire(before=3.0) == 0


def test_a_chunk_is_whole_or_absent(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[str, str, Instruction]]:
        yield "a", "home", instruction(1)
        raise RuntimeError("killed")

    with InstructionStore(tmp_path / "s.sqlite") as store:
        with pytest.raises(RuntimeError, match="killed"):
            store.put_many(rows())
        assert store.count() == 0
        store.put_many([("a", "home", instruction(1))])
        assert store.count() == 1


def test_readers_go_on_while_a_writer_is_in_the_middle(tmp_path: Path) -> None:
    with InstructionStore(tmp_path / "s.sqlite") as writer, InstructionStore(tmp_path / "s.sqlite") as reader:
        writer.put_many([("a", "home", instruction(1))])

        def rows() -> Iterator[tuple[str, str, Instruction]]:
            yield "b", "home", instruction(2)
            assert reader.get("a", "home") == instruction(1)
            assert reader.get("b", "home") is None

        writer.put_many(rows())
        assert reader.get("b", "home") == instruction(2)


def test_one_object_serves_many_threads(tmp_path: Path) -> None:
    with InstructionStore(tmp_path / "s.sqlite") as store:

        def work(t: int) -> None:
            for n in range(20):
                store.put_many([(f"u{t}.{n}", "home", instruction(n))])
                assert store.get(f"u{t}.{n}", "home") == instruction(n)

        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.count() == 80


def test_a_locked_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    InstructionStore(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with InstructionStore(path, patience=0.01) as store, pytest.raises(GenrecError, match="locked by another process"):
        store.put_many([("a", "home", instruction(1))])
    other.close()


def filled(path: Path) -> Path:
    with InstructionStore(path) as store:
        store.put_many([(f"user {n}", "home", instruction(n)) for n in range(500)])
    return path


def one_line(error: pytest.ExceptionInfo[GenrecError], path: Path) -> bool:
    return str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_one_clear_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.sqlite")
    size = path.stat().st_size
    for keep in (10, 100, 4096, size // 2, size - 100):
        os.truncate(path, keep)
        with pytest.raises(GenrecError, match="damaged") as error, InstructionStore(path) as store:
            store.all()
        assert one_line(error, path)
        path.unlink()
        filled(path)


def test_a_damaged_page_is_one_clear_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.sqlite")
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(GenrecError, match="damaged") as error, InstructionStore(path, create=False) as store:
        store.get("user 3", "home")
    assert one_line(error, path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.sqlite"
    text.write_text("these are my notes, long enough to be no header of a database at all\n" * 3)
    with pytest.raises(GenrecError, match="damaged"):
        InstructionStore(text)
    foreign = tmp_path / "foreign.sqlite"
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE precious (x)")
    db.close()
    with pytest.raises(GenrecError, match="no instruction store"):
        InstructionStore(foreign)
    future = filled(tmp_path / "future.sqlite")
    db = sqlite3.connect(future)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(GenrecError, match="format 7"):
        InstructionStore(future)


def test_a_reader_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.sqlite").touch()
    for name in ("none.sqlite", "empty.sqlite", "folder/none.sqlite"):
        with pytest.raises(GenrecError, match="missing or empty"):
            InstructionStore(tmp_path / name, create=False)
    assert [p.name for p in tmp_path.iterdir()] == ["empty.sqlite"]


def test_a_path_that_cannot_be_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "s.sqlite", tmp_path):
        with pytest.raises(GenrecError, match="cannot use"):
            InstructionStore(path)


def test_a_bundle_without_write_permission_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "s.sqlite")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with InstructionStore(path, create=False) as store:
        assert store.get("user 7", "home") == instruction(7)
        with pytest.raises(GenrecError, match="read-only"):
            store.put_many([("a", "home", instruction(1))])
        assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"]
