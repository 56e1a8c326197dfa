"""A bundle: a folder with everything that was trained, versioned, checksummed and written in one move.

    bundle.json       format, genrec version, config, and size and sha256 of every file below
    data/             the data set (Parquet)
    tokenizer/        semantic IDs and codebooks; text embeddings (float16)
    tools/<name>/     one folder per fitted tool
    rankers/<name>/   one per fitted ranker, where there are some
    generator/        the fast thinker (config.json, model.safetensors)
    fusion.json       the weights of the parts, per scenario
    report/           report.json, report.md, plots
    timeline.parquet  the instructions it was trained and tested with, where there are some
    instructions.sqlite   the slow thinker's store; it changes after the fit, so it has no checksum. It may be elsewhere

safetensors, Parquet, JSON and SQLite only. `seal` writes bundle.json last; `Bundle.load` refuses a folder
without it, with a file that is missing or differs, or of another format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec import __version__
from genrec.contracts import HOME
from genrec.data import Dataset, read_dataset
from genrec.errors import GenrecError
from genrec.instructions.store import InstructionStore, open_store
from genrec.instructions.timeline import Timeline
from genrec.io import atomic, check_shape, read_json, remove_temporaries, sha256, write_json
from genrec.tokenizer.embeddings import TextEmbedder
from genrec.tokenizer.semantic_ids import SemanticIDs
from genrec.tools import TOOLS, Tool
from genrec.tools.rankers import RANKERS, open_tool

if TYPE_CHECKING:
    from genrec.generator.model import GeneratorModel
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM

FORMAT = 2  # 2: fusion weights per scenario
MANIFEST = "bundle.json"
STORE = "instructions.sqlite"
TIMELINE = "timeline.parquet"
CONFIG = {"data": str, "protocol": str, "embedder": str, "embeddings": str, "tools": list, "seed": int}  # read here


def seal(folder: Path, config: dict[str, Any]) -> None:
    """Writes bundle.json over a finished folder that nobody writes into any more."""
    remove_temporaries(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((MANIFEST, STORE)))
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "genrec": __version__,
            "config": config,
            "files": {
                p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
            },
        },
    )


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all there and unchanged. Raises GenrecError otherwise."""
    if not folder.is_dir():
        raise GenrecError(f"{folder} is not a bundle: no such folder; make one with `genrec fit`")
    if not (folder / MANIFEST).is_file():
        raise GenrecError(f"{folder} is not a bundle: {MANIFEST} is missing; make one with `genrec fit`")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise GenrecError(
            f"{folder} is a bundle of format {found}, this genrec ({__version__}) reads format {FORMAT}; fit it again"
        )
    check_shape(folder / MANIFEST, manifest, {"config": dict, "files": dict})
    config = check_shape(folder / MANIFEST, manifest["config"], CONFIG)
    if unknown := [name for name in config["tools"] if name not in list(TOOLS)]:
        raise GenrecError(f"{folder / MANIFEST} is damaged: unknown tool {unknown[0]!r}")
    rankers = config.get("rankers", [])  # none in a bundle of before
    if not isinstance(rankers, list) or any(name not in RANKERS for name in rankers):
        raise GenrecError(f"{folder / MANIFEST} is damaged: its rankers are {str(rankers)[:60]}")
    for name, expected in manifest["files"].items():
        check_shape(folder / MANIFEST, expected, {"bytes": int, "sha256": str})
        path = folder / name
        if not path.is_file():
            raise GenrecError(f"{folder} is incomplete: {name} is missing; fit it again")
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise GenrecError(f"{folder} is damaged: {name} differs from its checksum; fit it again")
    return manifest


def save_embeddings(folder: Path, embeddings: np.ndarray) -> None:
    """Item text embeddings [N, D], kept as float16."""
    from safetensors.numpy import save_file

    with atomic(folder / "embeddings.safetensors") as path:
        save_file({"embeddings": embeddings.astype(np.float16)}, path)


def load_embeddings(folder: Path) -> np.ndarray:
    """float32 [N, D]."""
    from safetensors.numpy import load_file

    return load_file(folder / "embeddings.safetensors")["embeddings"].astype(np.float32)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; its parts are read when first used. instructions: where its store is, a file or a URL (see
    genrec.instructions.store); None for the file in the folder. device: where the generator computes; a request at a
    time is quick on a CPU, what ranks thousands takes `genrec.device.fastest_device`."""

    folder: Path
    config: dict[str, Any]
    instructions: Path | str | None = None
    device: str = "cpu"

    @classmethod
    def load(cls, folder: Path | str, instructions: Path | str | None = None, device: str = "cpu") -> Bundle:
        """Raises GenrecError where the folder is no bundle, is damaged, or is of another format."""
        folder = Path(folder)
        bundle = cls(folder, check(folder)["config"], instructions, device)
        _ = bundle.store  # connects to nothing, but a place that is none is said here
        return bundle

    @cached_property
    def dataset(self) -> Dataset:
        return read_dataset(self.folder / "data")

    @cached_property
    def semantic_ids(self) -> SemanticIDs:
        return SemanticIDs.load(self.folder / "tokenizer")

    @cached_property
    def embeddings(self) -> np.ndarray:
        return load_embeddings(self.folder / "tokenizer")

    @cached_property
    def embedder(self) -> TextEmbedder:
        return TextEmbedder(self.config["embedder"])

    @cached_property
    def tools(self) -> dict[str, Tool]:
        return {name: TOOLS[name].load(self.folder / "tools" / name) for name in self.config["tools"]}

    @cached_property
    def rankers(self) -> dict[str, MARM | SARM]:
        """Those that judge the shortlist, by name; none in most bundles."""
        return {name: open_tool(self.folder / "rankers" / name) for name in self.config.get("rankers", [])}

    @cached_property
    def generator(self) -> GeneratorModel:
        import torch

        from genrec.generator.model import GeneratorModel

        folder = self.folder / "generator"
        loaded: Any = GeneratorModel.from_pretrained(folder, output_loading_info=True)
        model: GeneratorModel = loaded[0]
        if any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise GenrecError(
                f"{folder} holds the weights of another version of the generator; remove the bundle and fit it again"
            )
        model.set_catalog(self.semantic_ids.trie, torch.from_numpy(self.embeddings))
        model.to(self.device)  # type: ignore[arg-type]
        return model.eval()

    @cached_property
    def weights(self) -> dict[str, dict[str, dict[str, float]]]:
        """Per scenario the fusion weights chosen on validation: "floors" for the tools alone, "fused" with all."""
        return read_json(self.folder / "fusion.json")

    def fusion(self, scenario: str) -> dict[str, dict[str, float]]:
        """The weights of one scenario; home's for one that had no validation requests."""
        return self.weights.get(scenario) or self.weights[HOME]

    @cached_property
    def timeline(self) -> Timeline | None:
        """The instructions over time that the generator was trained and tested with; None without any."""
        path = self.folder / TIMELINE
        return Timeline.load(path) if path.exists() else None

    @cached_property
    def store(self) -> InstructionStore:
        """Empty where it does not exist yet; the folder may be read-only then."""
        return open_store(self.instructions or self.folder / STORE)
