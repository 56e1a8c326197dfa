"""Where data sets come from: a name, a folder, a file, Arrow tables in memory, or the Hugging Face hub.

    load_dataset("ml-100k")                 MovieLens-100K, fetched and kept (archives.py)
    load_dataset("amazon14:folder")         Amazon 2014: our own two files or the publisher's 5-core JSON
    load_dataset("folder")                  interactions.*, items.* (or catalog.*) and, where there is one, users.*;
                                            or any folder named here
    load_dataset("interactions.csv")        one file; the catalogue is derived from it
    load_dataset("hf:owner/name")           a hub data set
    from_arrow(table), from_datasets(ds)    from Python

Files may be Parquet, CSV, TSV or JSON lines, each also .gz; columns are described in schema.py.
"""

from __future__ import annotations

import ast
import html
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from genrec.data.archives import movielens_tables, publisher_tables
from genrec.data.build import build
from genrec.data.dataset import Dataset
from genrec.data.readers import RawTable, file_kind, nearest, read_bytes, read_table, shown
from genrec.data.store import MANIFEST, read_dataset
from genrec.errors import GenrecError

if TYPE_CHECKING:
    import datasets

EVENT_FILES = ("interactions", "events", "ratings")
ITEM_FILES = ("items", "catalog", "catalogue", "products")
USER_FILES = ("users", "customers")
MAX_LINE = 1 << 20  # bytes of one line of Amazon's metadata
AMAZON_ASIN = re.compile(rb"""["']asin["']\s*:\s*["']([^"']{1,32})["']""")


def load_dataset(source: str | Path, cache: Path | None = None) -> Dataset:
    """A data set by name, folder, file or hub name, as listed above. cache: where downloads are kept, by default
    genrec.io.cache_folder(). Raises GenrecError, one line, for everything that is wrong with it."""
    text = str(source)
    if text == "ml-100k":
        return build("ml-100k", *movielens_tables(cache))
    if text.startswith("amazon14:"):
        return _folder(Path(text.removeprefix("amazon14:")).expanduser())
    if text.startswith("hf:"):
        return _from_hub(text.removeprefix("hf:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return build(path.name.split(".")[0], read_table(path))
    raise GenrecError(
        f"no file or folder {text!r}; data sets are ml-100k, amazon14:FOLDER, hf:OWNER/NAME, a folder with "
        f"interactions.csv and items.csv, or one file of interactions.{nearest(text, ['ml-100k'])}"
    )


def from_arrow(
    interactions: pa.Table, catalog: pa.Table | None = None, name: str = "arrow", users: pa.Table | None = None
) -> Dataset:
    """A data set from tables in memory, with the columns that schema.py describes.

    Example: from_arrow(pa.table({"user": ["a", "a"], "item": ["x", "y"], "timestamp": [1, 2]}))
    """
    raw = {"interactions": interactions, "catalog": catalog, "users": users}
    tables = {title: RawTable(title, table) for title, table in raw.items() if table is not None}
    if empty := next((title for title, table in tables.items() if table.table.num_rows == 0), None):
        raise GenrecError(f"{empty}: the table is empty")
    return build(name, tables["interactions"], tables.get("catalog"), tables.get("users"))


def from_datasets(
    interactions: datasets.Dataset | datasets.DatasetDict,
    catalog: datasets.Dataset | None = None,
    name: str = "datasets",
    users: datasets.Dataset | None = None,
) -> Dataset:
    """A data set from the `datasets` package. A DatasetDict may hold the splits "interactions", "items" (or
    "catalog") and "users"; otherwise its splits are joined, in their order, to one table of interactions."""
    if isinstance(interactions, dict):
        parts = dict(interactions)
        catalog = catalog if catalog is not None else next((parts[n] for n in ITEM_FILES if n in parts), None)
        users = users if users is not None else next((parts[n] for n in USER_FILES if n in parts), None)
        other = [d for n, d in parts.items() if n not in (*ITEM_FILES, *USER_FILES)]
        events = [parts[n] for n in EVENT_FILES if n in parts] or other
    else:
        events = [interactions]
    if not events:
        raise GenrecError(f"{name} has no split with interactions")
    table = pa.concat_tables([d.with_format("arrow")[:] for d in events], promote_options="permissive")
    beside = [None if d is None else d.with_format("arrow")[:] for d in (catalog, users)]
    return from_arrow(table, beside[0], name, beside[1])


def _from_hub(name: str) -> Dataset:
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each of its retries would be a line on the screen
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise GenrecError(
            f"hf:{name} cannot be loaded: {reason}; check the name and the network, or give a folder"
        ) from None
    finally:
        logger.setLevel(level)
    return from_datasets(loaded, name=name.replace("/", "-"))


def _folder(folder: Path) -> Dataset:
    """A folder by what is in it: a saved data set, MovieLens' own files, Amazon's own files, or a user's."""
    if not folder.is_dir():
        raise GenrecError(f"no folder {str(folder)!r}")
    name = folder.resolve().name
    if (folder / MANIFEST).is_file():
        return read_dataset(folder)
    if (folder / "u.data").is_file() and (folder / "u.item").is_file():
        films = read_bytes(folder / "u.item")
        return build(name, *publisher_tables(read_bytes(folder / "u.data"), films, str(folder)))
    if reviews := sorted(folder.glob("reviews_*.json*")):
        return _amazon(name, reviews, sorted(folder.glob("meta_*.json*")))
    events, items, users = (one_file(folder, stems) for stems in (EVENT_FILES, ITEM_FILES, USER_FILES))
    if events is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
        raise GenrecError(
            f"{folder} has no interactions.* (Parquet, CSV, TSV or JSON lines, also .gz), nor Amazon's "
            f"reviews_*.json.gz; there is: {there}"
        )
    beside = [None if path is None else read_table(path) for path in (items, users)]
    return build(name, read_table(events), *beside)


def one_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The table in a folder that has one of these names, or None. Raises GenrecError where there are several."""
    found = sorted(p for p in folder.iterdir() if p.name.split(".")[0].lower() in stems and file_kind(p))
    if len(found) > 1:
        raise GenrecError(f"{folder} has {' and '.join(p.name for p in found)}; keep one of them")
    return found[0] if found else None


def _amazon(name: str, reviews: list[Path], metas: list[Path]) -> Dataset:
    """The publisher's 5-core: reviews_X_5.json and, for the items' text, meta_X.json (Python literals, a line each).

    The catalogue is the items that are reviewed, in order of first review; ones without metadata have no text.
    """
    if len(reviews) > 1 or len(metas) > 1:
        raise GenrecError(
            f"{reviews[0].parent} has {len(reviews)} reviews_* and {len(metas)} meta_* files; keep one each"
        )
    raw = read_table(reviews[0])
    if not metas or "asin" not in raw.table.column_names:
        return build(name, raw)
    ids = pc.unique(pc.cast(raw.table["asin"], pa.string()).drop_null()).to_pylist()
    found = _amazon_meta(metas[0], set(ids))
    rows = [found.get(item, {}) for item in ids]
    paths = [(r.get("categories") or [[]])[0] for r in rows]
    table = pa.table(
        {
            "item": pa.array(ids, pa.string()),
            "title": pa.array([_text(r.get("title")) for r in rows], pa.string()),
            "category": pa.array([[_text(c) for c in p] if isinstance(p, list) else [] for p in paths]),
            "brand": pa.array([_text(r.get("brand")) for r in rows], pa.string()),
        }
    )
    return build(name, raw, RawTable(str(metas[0]), table))


def _amazon_meta(path: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """The metadata of the wanted items. Only their lines are parsed, as JSON or as a Python literal: data, no code."""
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        match = AMAZON_ASIN.search(line)
        if match is None or match[1].decode("utf-8", "replace") not in wanted or len(line) > MAX_LINE:
            continue
        try:
            value = json.loads(line)
        except ValueError:
            try:
                value = ast.literal_eval(line.decode("utf-8"))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                start = shown(line[:200].decode("utf-8", "replace"))
                raise GenrecError(f"{path}, line {number}: neither JSON nor a Python literal: {start}") from None
        if isinstance(value, dict) and isinstance(value.get("asin"), str):
            found.setdefault(value["asin"], value)
    return found


def _text(value: object) -> str:
    return html.unescape(value) if isinstance(value, str) else ""
