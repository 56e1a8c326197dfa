import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrec.contracts import Instruction
from genrec.errors import GenrecError
from genrec.instructions import InstructionStore, open_store
from genrec.instructions.sqlite_store import SQLiteStore
from genrec.instructions.store import Row
from tests.instructions.store_contract import StoreContract, instruction


class TestSQLite(StoreContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "deep" / "s.sqlite")

    def open(self, place: str) -> InstructionStore:
        store = open_store(place)
        assert isinstance(store, SQLiteStore)
        return store


def test_no_log_is_left_once_it_is_closed(tmp_path: Path) -> None:
    with SQLiteStore(tmp_path / "s.sqlite") as store:
        store.put_many([("a", "home", instruction(1))])
    assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"]


def test_readers_go_on_while_a_writer_is_in_the_middle(tmp_path: Path) -> None:
    with SQLiteStore(tmp_path / "s.sqlite") as writer, SQLiteStore(tmp_path / "s.sqlite") as reader:
        writer.put_many([("a", "home", instruction(1))])

        def rows() -> Iterator[Row]:
            yield "b", "home", instruction(2)
            assert reader.get("a", "home") == instruction(1)
            assert reader.get("b", "home") is None

        writer.put_many(rows())
        assert reader.get("b", "home") == instruction(2)


def test_a_locked_store_says_so(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.sqlite")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with SQLiteStore(path, patience=0.01) as store:
        assert store.count() == 500  # a writer does not keep readers out
        with pytest.raises(GenrecError, match="locked by another process"):
            store.put_many([("a", "home", instruction(1))])
    other.execute("COMMIT")
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with SQLiteStore(path, patience=0.01) as store, pytest.raises(GenrecError, match="locked by another process"):
        store.count()
    other.close()


def filled(path: Path) -> Path:
    with SQLiteStore(path) as store:
        store.put_many([(f"user {n}", "home", instruction(n)) for n in range(500)])
    return path


def one_line(error: pytest.ExceptionInfo[GenrecError], path: Path) -> bool:
    return str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_one_clear_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.sqlite")
    size = path.stat().st_size
    for keep in (10, 100, 4096, size // 2, size - 100):
        os.truncate(path, keep)
        with pytest.raises(GenrecError, match="damaged") as error, SQLiteStore(path) as store:
            store.all()
        assert one_line(error, path)
        path.unlink()
        filled(path)


def test_a_damaged_page_is_one_clear_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "s.sqlite")
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(GenrecError, match="damaged") as error, SQLiteStore(path) as store:
        store.get("user 3", "home")
    assert one_line(error, path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.sqlite"
    text.write_text("these are my notes, long enough to be no header of a database at all\n" * 3)
    foreign = tmp_path / "foreign.sqlite"
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE precious (x)")
    db.close()
    future = filled(tmp_path / "future.sqlite")
    db = sqlite3.connect(future)
    db.execute("PRAGMA user_version = 7")
    db.close()
    for path, said in ((text, "damaged"), (foreign, "no instruction store"), (future, "format 7")):
        before = path.read_bytes()
        with pytest.raises(GenrecError, match=said):
            SQLiteStore(path).count()
        with pytest.raises(GenrecError, match=said):
            SQLiteStore(path).put_many([("a", "home", instruction(1))])
        assert path.read_bytes() == before


def test_a_store_of_the_first_format_is_carried_over(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    db = sqlite3.connect(path)
    db.execute(
        "CREATE TABLE instructions (user TEXT NOT NULL, scenario TEXT NOT NULL, situation, intents, look_for,"
        " rationale, model, prompt_version, context_hash, created REAL NOT NULL, PRIMARY KEY (user, scenario))"
        " WITHOUT ROWID"
    )
    db.execute("INSERT INTO instructions VALUES ('u', 'home', 's', '[\"i\"]', 'tea', '', 'm', 'p', 'h', 5.0)")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    with SQLiteStore(path) as store:
        assert store.get("u", "home") == Instruction("s", ("i",), "tea", "", "m", "p", "h", 5.0, 0)
        store.put_many([("u", "home", instruction(1, events=3))])
        assert store.all() == [("u", "home", instruction(1, events=3))]


def test_a_reader_makes_no_file_and_sees_it_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty.sqlite").touch()
    for name in ("none.sqlite", "empty.sqlite", "folder/none.sqlite"):
        with SQLiteStore(tmp_path / name) as reader:
            assert reader.get("a", "home") is None and reader.count() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["empty.sqlite"]
    with SQLiteStore(tmp_path / "folder" / "s.sqlite") as reader:
        assert reader.get("user 7", "home") is None
        path = filled(tmp_path / "folder" / "s.sqlite")
        assert reader.get("user 7", "home") == instruction(7)
        path.unlink()  # as after damage
        assert reader.get("user 7", "home") is None
        with SQLiteStore(path) as writer:
            writer.put_many([("user 7", "home", instruction(8))])
            assert reader.get("user 7", "home") == instruction(8)


def test_a_path_that_cannot_be_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "s.sqlite", tmp_path):
        with pytest.raises(GenrecError, match="cannot use") as error:
            SQLiteStore(path).put_many(())
        assert one_line(error, path)


def test_a_bundle_without_write_permission_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "s.sqlite")
    with monkeypatch.context() as locked:
        locked.setattr(os, "access", lambda *_: False)
        with SQLiteStore(path) as store, SQLiteStore(tmp_path / "none.sqlite") as missing:
            assert store.get("user 7", "home") == instruction(7) and missing.get("user 7", "home") is None
            with pytest.raises(GenrecError, match="read-only"):
                store.put_many([("a", "home", instruction(1))])
            assert [p.name for p in tmp_path.iterdir()] == ["s.sqlite"]


def test_a_reader_without_write_permission_follows_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "s.sqlite")
    may_write = True
    monkeypatch.setattr(os, "access", lambda *_: may_write)
    writer, reader = SQLiteStore(path), SQLiteStore(path)
    may_write = False
    assert reader.get("user 7", "home") == instruction(7)
    may_write = True
    writer.put_many([("user 7", "home", instruction(8))])
    may_write = False
    assert reader.get("user 7", "home") == instruction(8)
    may_write = True
    writer.close()
    may_write = False
    assert reader.get("user 7", "home") == instruction(8)
    reader.close()


def test_a_place_that_is_none_is_one_clear_line() -> None:
    with pytest.raises(GenrecError, match="mysql:// is no instruction store; give a file, or a URL of redis"):
        open_store("mysql://host/db")
