"""Fits of an experiment: arms that differ in what the generator learns, and share all that comes before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from genrec.errors import GenrecError
from genrec.io import read_json, write_json
from training.config import FitConfig
from training.fit import Fit, identity_of

OWN = ("instructions", "told.safetensors", "timeline.parquet", "config.json", "generator")  # what arms do not share
SHARED = (
    "data",
    "protocol",
    "seed",
    "levels",
    "codes",
    "embedder",
    "embeddings",
    "tools",
    "rankers",
    "genrec",
)  # what they must
ABOUT = "prepared.json"
MADE_ON = "machine.json"  # in an arm's report: what it was made on


class Arm(Fit):
    """One fit. prepared: a folder where the first arm of a seed leaves data, semantic IDs, tools and teaching for the
    others; it says what it does under the name of its bundle. A killed arm goes on, as every fit does."""

    def __init__(self, config: FitConfig, prepared: Path) -> None:
        super().__init__(config, lambda line: print(f"{config.out.name}: {line}", flush=True))
        self.prepared = prepared

    def run(self) -> Path:
        if self.prepared.exists() and not self.work.exists() and not self.out.exists():
            made, mine = read_json(self.prepared / ABOUT), identity_of(self.config)
            if other := [key for key in SHARED if made.get(key) != mine.get(key)]:
                raise GenrecError(
                    f"{self.prepared} was prepared with another {other[0]} ({made.get(other[0])}, not "
                    f"{mine.get(other[0])}); use another --work"
                )
            copy = self.work.with_name(self.work.name + ".copy")
            shutil.copytree(self.prepared, copy, dirs_exist_ok=True)
            write_json(copy / "config.json", identity_of(self.config))
            copy.replace(self.work)
        return super().run()

    def train_generator(self) -> str:
        if not self.prepared.exists():
            copy = self.prepared.with_name(f"{self.prepared.name}.{self.out.name}")
            shutil.copytree(self.work, copy, ignore=shutil.ignore_patterns(*OWN), dirs_exist_ok=True)
            write_json(copy / ABOUT, {key: identity_of(self.config)[key] for key in SHARED})
            copy.replace(self.prepared)
        return super().train_generator()


def finished(work: Path) -> dict[str, dict[int, Path]]:
    """The finished arms in a folder: name -> seed -> bundle. Arms are named NAME.SEED."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(work.glob("*.*")):
        name, _, seed = path.name.rpartition(".")
        if seed.isdigit() and (path / "bundle.json").is_file():
            found.setdefault(name, {})[int(seed)] = path
    return found


def machines(folders: list[Path]) -> list[dict[str, Any]]:
    """Those that finished arms were made on, each once."""
    found = [read_json(path / "report" / MADE_ON) for path in folders if (path / "report" / MADE_ON).is_file()]
    return [one for i, one in enumerate(found) if one not in found[:i]]
