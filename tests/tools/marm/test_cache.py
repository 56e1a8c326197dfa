import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.tools.marm import cache as module
from genrec.tools.marm.cache import CacheConfig, StateCache, user_key

CONFIG = CacheConfig(users=3, events=4, levels=2, d=5, model="m1")
ROOT = Path(__file__).parents[3]


def states(value: float, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 5), value, np.float32)


def put(cache: StateCache, key: int, place: int, value: float, item: int = 7) -> None:
    cache.write(np.array([key]), np.array([place]), np.array([item]), states(value))


def get(cache: StateCache, key: int, *places: int, item: int = 7) -> list[float | None]:
    at = np.array([places])
    found, there = cache.read(np.array([key]), at, np.where(at >= 0, item, -1))
    return [float(s.max()) if ok else None for s, ok in zip(found[0], there[0], strict=True)]


@pytest.fixture(params=["memory", "file"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> StateCache:
    return StateCache(CONFIG, tmp_path / "c" / "states.cache" if request.param == "file" else None)


def test_what_was_written_is_read_and_nothing_else(cache: StateCache) -> None:
    put(cache, 11, 0, 1.5)
    put(cache, 11, 1, 2.5)
    assert get(cache, 11, -1, 0, 1, 2) == [None, 1.5, 2.5, None]
    assert get(cache, 12, 0, 1) == [None, None]
    assert get(cache, 11, 0, item=8) == [None]  # another item at that place: another history
    assert cache.entries == 2


def test_a_missing_state_is_zeros(cache: StateCache) -> None:
    found, there = cache.read(np.array([5]), np.array([[0, -1]]), np.array([[1, -1]]))
    assert not there.any() and not found.any() and found.shape == (1, 2, 2, 5)


def test_newer_events_take_the_slots_of_old_ones(cache: StateCache) -> None:
    for place in range(6):
        put(cache, 11, place, float(place))
    assert get(cache, 11, *range(6)) == [None, None, 2, 3, 4, 5]
    put(cache, 11, 5, 9.0)
    assert get(cache, 11, 5) == [9.0] and cache.entries == 4


def test_the_user_unseen_for_longest_makes_room(cache: StateCache) -> None:
    for key in (1, 2, 3):
        put(cache, key, 0, float(key))
    get(cache, 1, 0)  # was here again
    put(cache, 3, 1, 3.0)
    put(cache, 4, 0, 4.0)
    assert [get(cache, key, 0) for key in (1, 2, 3, 4)] == [[1.0], [None], [3.0], [4.0]]
    assert cache.entries == 4


def test_more_users_at_once_than_rows_leave_nobodys_state_with_another(cache: StateCache) -> None:
    keys = np.array([1, 2, 3, 4])
    cache.write(keys, np.array([0, 1, 2, 3]), np.full(4, 7), np.concatenate([states(float(k)) for k in keys]))
    assert cache.entries == 3
    for key in keys.tolist():
        assert all(value in (None, float(key)) for value in get(cache, key, 0, 1, 2, 3))


def test_two_states_for_one_slot_leave_the_later(cache: StateCache) -> None:
    cache.write(
        np.array([1, 1, 2]), np.array([0, 4, 0]), np.array([7, 7, 7]), np.concatenate([states(v) for v in (1, 2, 3)])
    )
    assert get(cache, 1, 0, 4) == [None, 2.0] and get(cache, 2, 0) == [3.0]


def test_clearing_and_snapshots(cache: StateCache) -> None:
    put(cache, 1, 0, 1.0)
    kept = cache.snapshot()
    put(cache, 1, 1, 2.0)
    cache.clear()
    assert cache.entries == 0 and get(cache, 1, 0, 1) == [None, None]
    cache.restore(kept)
    assert get(cache, 1, 0, 1) == [1.0, None]


def test_values_beyond_float16_are_bounded(cache: StateCache) -> None:
    put(cache, 1, 0, 1e9)
    assert get(cache, 1, 0) == [65504.0]


def test_a_file_is_found_again_and_bytes_are_as_counted(tmp_path: Path) -> None:
    path = tmp_path / "states.cache"
    with StateCache(CONFIG, path) as cache:
        put(cache, 11, 3, 1.5)
    assert path.stat().st_size == CONFIG.total_bytes and CONFIG.state_bytes == 3 * 4 * 2 * 5 * 2
    with StateCache(CONFIG, path) as again:
        assert get(again, 11, 3) == [1.5]
        put(again, 11, 4, 2.5)
        reader = StateCache(CONFIG, path, write=False)
        assert get(reader, 11, 3, 4) == [1.5, 2.5]
        put(again, 12, 0, 3.5)  # a user who came after the reader was opened
        assert get(reader, 12, 0) == [3.5]
        with pytest.raises(GenrecError, match="open for reading"):
            put(reader, 11, 5, 1.0)


def test_a_reader_notices_that_a_row_changed_hands(tmp_path: Path) -> None:
    with StateCache(CONFIG, tmp_path / "c") as cache:
        for key in (1, 2, 3):
            put(cache, key, 0, float(key))
        reader = StateCache(CONFIG, tmp_path / "c", write=False)
        assert get(reader, 1, 0) == [1.0]
        put(cache, 4, 0, 4.0)  # in the row of 1
        assert get(reader, 1, 0) == [None] and get(reader, 4, 0) == [4.0]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with StateCache(CONFIG, tmp_path / "c"), pytest.raises(GenrecError, match="one writer"):
        StateCache(CONFIG, tmp_path / "c")
    StateCache(CONFIG, tmp_path / "c").close()


@pytest.mark.parametrize("change", [{"model": "m2"}, {"d": 6}, {"events": 5}, {"dtype": "float32"}])
def test_a_cache_of_another_model_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    StateCache(CONFIG, tmp_path / "c").close()
    for write in (True, False):
        with pytest.raises(GenrecError, match="another model"):
            StateCache(replace(CONFIG, **change), tmp_path / "c", write)  # type: ignore[arg-type]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(GenrecError, match="there is no cache"):
        StateCache(CONFIG, path, write=False)
    StateCache(CONFIG, path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(GenrecError, match="cut off"):
        StateCache(CONFIG, path)
    for content in (b"hello", b"", b"\xff" * 5000):
        path.write_bytes(content)
        with pytest.raises(GenrecError, match="damaged"):
            StateCache(CONFIG, path)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StateCache, "_reserve", staticmethod(full))
    with pytest.raises(GenrecError, match="No space left"):
        StateCache(CONFIG, tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c.lock"]
    monkeypatch.undo()
    StateCache(CONFIG, tmp_path / "c").close()  # and the lock was let go


def test_after_a_crash_of_the_machine_nothing_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StateCache(CONFIG, tmp_path / "c")
    put(cache, 1, 0, 1.0)
    cache._stack.close()  # as if the process were gone
    monkeypatch.setattr(module, "_boot", lambda: "another")
    with pytest.raises(GenrecError, match="went down"):
        StateCache(CONFIG, tmp_path / "c", write=False)
    with StateCache(CONFIG, tmp_path / "c") as again:
        assert again.entries == 0 and get(again, 1, 0) == [None]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from genrec.tools.marm.cache import CacheConfig, StateCache
cache = StateCache(CacheConfig(users=2, events=8, levels=3, d=4000, model="k"), Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    n = n % 2000 + 1
    place = n % 8
    cache.write(np.array([1]), np.array([place]), np.array([n]), np.full((1, 3, 4000), n, np.float32))
"""


def test_a_killed_writer_leaves_no_half_state_and_readers_never_see_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    config = CacheConfig(users=2, events=8, levels=3, d=4000, model="k")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        reader = StateCache(config, path, write=False)
        seen, end = 0, time.monotonic() + 20
        while seen < 100 and time.monotonic() < end:
            seen += whole(reader)
        assert seen >= 100
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with StateCache(config, path) as again:
        assert whole(again) >= 7  # at most the one that was being written is missing


def whole(cache: StateCache) -> int:
    """Reads all slots with the items they hold now; checks that each state is of one write; returns how many."""
    items = cache._items[0].copy()
    found, there = cache.read(np.array([1]), np.arange(8)[None], items[None])
    for state, item in zip(found[0][there[0]], items[there[0]], strict=True):
        assert (state == np.float16(item)).all()
    return int(there.sum())


def test_threads_read_while_one_writes() -> None:
    cache = StateCache(CacheConfig(users=1, events=2, levels=1, d=2000))
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            items = cache._items[0].copy()
            found, there = cache.read(np.array([1]), np.arange(2)[None], items[None])
            wrong.extend(s for s, i in zip(found[0][there[0]], items[there[0]], strict=True) if not (s == i).all())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for n in range(300):
        cache.write(np.array([1]), np.array([n % 2]), np.array([n]), np.full((1, 1, 2000), n, np.float32))
    done.set()
    for thread in readers:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("change", [{"users": 0}, {"events": 0}, {"d": 0}, {"levels": -1}, {"dtype": "int8"}])
def test_sizes_are_checked(change: dict[str, object]) -> None:
    with pytest.raises(GenrecError):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_keys_are_positive_and_differ() -> None:
    keys = {user_key(f"u{n}") for n in range(5000)}
    assert len(keys) == 5000 and min(keys) > 0
