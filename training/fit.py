"""From raw interactions to a finished bundle: data, semantic IDs, tools, generator, fusion, report.

    python -m training.fit --help        (the same job as `genrec fit`)

Every stage writes its result into <out>.work and leaves a marker when it is whole; a killed fit that is
started again skips finished stages and takes up the generator at its last checkpoint. The finished folder
is renamed to <out> in one move.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from genrec import __version__
from genrec.bundle import MANIFEST, TIMELINE, Bundle, load_embeddings, save_embeddings, seal
from genrec.contracts import HOME
from genrec.data import (
    SCENARIOS,
    Dataset,
    EvalSet,
    Split,
    chronological,
    leave_one_out,
    load_dataset,
    read_dataset,
    rolling,
    save_dataset,
    target_mask,
)
from genrec.data.scenarios import ways_to_ask
from genrec.device import fastest_device
from genrec.errors import GenrecError
from genrec.evaluation.metrics import ndcg
from genrec.instructions.timeline import Timeline
from genrec.io import (
    TEMPORARY,
    atomic,
    check_writable,
    digest,
    locked,
    read_json,
    remove_temporaries,
    write_json,
    write_text,
)
from genrec.tokenizer.embeddings import TextEmbedder, embed_texts
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from genrec.tools import TOOLS
from training.config import FitConfig

if TYPE_CHECKING:
    from genrec.generator.batches import TrainingData
    from genrec.generator.model import GeneratorModel
    from training.generator import Progress

Report = Callable[[str], None]

SPLITS: dict[str, Callable[[Dataset], Split]] = {
    "leave-one-out": leave_one_out,
    "rolling": rolling,
    "chronological": chronological,
}
WEIGHING = 8000  # validation requests; with 4,000 the chosen weights were slightly overfitted on Beauty
SHARES = {"item": 0.1, "search": 0.3, "favourites": 0.1, "discovery": 0.1}  # of the qualifying positions; ours


class Fit:
    """The stages of one fit, in order, over one work folder."""

    def __init__(self, config: FitConfig, report: Report) -> None:
        self.config, self.report = config, report
        self.out = Path(config.out)
        if self.out.name in ("", ".."):
            raise GenrecError(f"--out {config.out} names no folder of its own; give the bundle a name")
        self.work = self.out.with_name(self.out.name + ".work")
        self.folder = self.work / "bundle"

    def stage(self, name: str, job: Callable[[], str]) -> None:
        """Runs a stage unless its marker is there; `job` returns one line that says what came out."""
        marker = self.work / "done" / name
        if marker.exists():
            self.report(f"{name}: done before ({marker.read_text(encoding='utf-8').strip()})")
            return
        clock = time.perf_counter()
        said = job()
        seconds = time.perf_counter() - clock
        write_text(marker, f"{said}\n")
        self.report(f"{name}: {said} [{seconds:.1f} s]")

    def run(self) -> Path:
        """The finished bundle. An existing bundle of the same config is returned as it is."""
        identity = self.identity()
        if self.finished(identity):
            return self.out
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise GenrecError(f"{self.out} exists and is no bundle; choose another --out")
        started = self.work / "config.json"
        begun = started.exists() and any((self.work / "done").glob("[!.]*"))  # with data that can be fitted
        if begun and read_json(started) != identity:
            raise GenrecError(
                f"{self.work} holds a started fit of other settings or data; remove it or choose another --out"
            )
        for path in filter(None, (self.config.embeddings, self.config.instructions)):
            if not Path(path).is_file():
                raise GenrecError(f"{path}: no such file")
        if self.work.exists() and not self.ours():
            raise GenrecError(f"{self.work} exists and is no started fit; choose another --out")
        quiet()
        check_writable(self.folder)
        with locked(self.work / "lock", f"another fit is at work in {self.work}; wait for it or choose another --out"):
            if not self.finished(identity):  # by a fit that has just ended
                self.make(identity)
        return self.out

    def identity(self) -> dict[str, Any]:
        """What makes two fits the same; the bundle's config."""
        return identity_of(self.config)

    def finished(self, identity: dict[str, Any]) -> bool:
        """Whether the bundle is there, made with the same settings. Clears away the work folder that a kill after the
        last move leaves. Raises GenrecError for a bundle of other settings."""
        if not (self.out / MANIFEST).is_file():
            return False
        if Bundle.load(self.out).config != identity:
            raise GenrecError(f"{self.out} holds a bundle of other settings or data; remove it or choose another --out")
        started = self.work / "config.json"
        if self.ours() and (not started.exists() or read_json(started) == identity):
            self.clear()
        self.report(f"{self.out} is there already, made with the same settings")
        return True

    def ours(self) -> bool:
        """Whether the work folder is that of a started fit, or of one that was killed before it began."""
        if not self.work.is_dir():
            return False
        there = {path.name for path in self.work.iterdir() if not path.match(TEMPORARY)}
        return "config.json" in there or there <= {self.folder.name, "lock"}

    def clear(self) -> None:
        """Removes the work folder; what makes it ours goes last."""
        with contextlib.suppress(FileNotFoundError):  # another process clears it too
            for path in self.work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != "config.json":
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def make(self, identity: dict[str, Any]) -> None:
        """Runs the stages and moves the result into place."""
        remove_temporaries(self.work)
        write_json(self.work / "config.json", identity)
        self.stage("data", self.data)
        self.dataset = read_dataset(self.folder / "data")
        self.split = SPLITS[self.config.protocol](self.dataset)
        self.stage("embeddings", self.embed)
        self.stage("semantic-ids", self.tokenize)
        for name in self.config.tools:
            self.stage(f"tool-{name}", partial(self.fit_tool, name))
        for name in self.config.rankers:
            self.stage(f"ranker-{name}", partial(self.fit_ranker, name))
        self.stage("floors", self.choose_floor_weights)
        self.stage("teaching", self.teach)
        self.stage("queries", self.embed_queries)
        self.stage("instructions", self.embed_instructions)
        self.stage("generator", self.train_generator)
        self.stage("fusion", self.choose_weights)
        self.stage("report", self.make_report)
        seal(self.folder, identity)
        if self.out.exists():
            self.out.rmdir()
        self.folder.replace(self.out)
        self.clear()

    # -- stages -------------------------------------------------------------------------------------

    def data(self) -> str:
        dataset = load_dataset(self.config.data)
        split = SPLITS[self.config.protocol](dataset)  # what cannot be fitted is refused before anything is kept
        if split.train.lengths.max() < 2:
            raise GenrecError(
                f"no user of {dataset.name} has 2 events left to train on after the {self.config.protocol} split"
            )
        if self.config.rankers:
            from genrec.tools.ranking.samples import rated_samples

            rated_samples(replace(dataset, sequences=split.train))
        save_dataset(dataset, self.folder / "data")
        s = dataset.sequences
        return f"{dataset.name}, {len(s):,} users, {len(dataset.catalog):,} items, {s.events:,} events"

    def embed(self) -> str:
        catalog = self.dataset.catalog
        if self.config.embeddings:
            vectors = read_embeddings(Path(self.config.embeddings), len(catalog))
        else:
            embedder = TextEmbedder(self.config.embedder)
            vectors = embedder(catalog.texts, lambda n, of: self.report(f"embeddings: {n:,} of {of:,} items"))
        save_embeddings(self.folder / "tokenizer", vectors)
        return f"{vectors.shape[0]:,} items, {vectors.shape[1]} dimensions"

    def tokenize(self) -> str:
        from genrec.tokenizer.report import report

        vectors = load_embeddings(self.folder / "tokenizer")
        config = TokenizerConfig(self.config.levels, self.config.codes, seed=self.config.seed)
        ids = SemanticIDs.fit(vectors, config)
        ids.save(self.folder / "tokenizer")
        found = report(ids, vectors, self.dataset.catalog.categories)
        write_json(self.folder / "report" / "semantic_ids.json", found.as_dict())
        used = ", ".join(f"{u:.0%}" for u in found.utilisation)
        return f"{ids.codes.shape[1]} levels, codes in use {used}, {found.collisions} collisions"

    def fit_tool(self, name: str) -> str:
        kind = TOOLS[name]
        tool = kind(kind.config_type(seed=self.config.seed)) if hasattr(kind.config_type, "seed") else kind()
        tool.work, tool.say = self.work / f"tool-{name}", lambda line: self.report(f"tool-{name}: {line}")
        tool.fit(self.split.train, self.dataset.catalog).save(self.folder / "tools" / name)
        return "fitted on the training events"

    def fit_ranker(self, name: str) -> str:
        """On the ratings of the training events; a tenth of each user's says when to stop."""
        from genrec.tools.rankers import train_ranker

        rated = replace(self.dataset, sequences=self.split.train)
        tool = train_ranker(name, rated, self.report, self.config.seed)
        tool.save(self.folder / "rankers" / name)
        return f"the chance of {tool.profile.names[0]}, learned from {rated.sequences.events:,} training events"

    def choose_floor_weights(self) -> str:
        from training.evaluate import floor_weights

        tools = self.parts().tools
        weights = floor_weights(tools, self.split.validation.sample(WEIGHING, seed=2))
        write_json(self.work / "floors.json", {"floors": weights})
        return ", ".join(f"{name} {w:g}" for name, w in weights.items() if w) or "none"

    def teach(self) -> str:
        """The tools' proposals at the training positions, each from tools not fitted on its user."""
        from genrec.generator.teacher import teach

        chosen = read_json(self.work / "floors.json")["floors"]
        weights = {n: w for n, w in chosen.items() if w and TOOLS[n].quick}  # the teachers are fitted once per fold
        if not self.config.teaching or not weights:
            return "none"
        catalog, train = self.dataset.catalog, self.split.train

        def say(done: int, total: int) -> None:
            self.report(f"teaching: {done:,} of {total:,} positions")

        tools = {n: TOOLS[n] for n in weights}
        taught = teach(train, catalog, tools, weights, seed=self.config.seed, report=say)
        with atomic(self.work / "taught.safetensors") as path:
            save_file({"taught": taught}, path)
        return f"{', '.join(weights)} propose {taught.shape[1]} items at each position"

    def embed_queries(self) -> str:
        """Query embeddings for the search scenario, as many for each item as the item with most ways to ask has."""
        if self.config.embeddings or "search" not in self.dataset.scenarios:
            return "none: own embeddings have no text encoder" if self.config.embeddings else "none: items have no text"
        ways = ways_to_ask(self.dataset.catalog)
        unique = sorted({text for texts in ways for text in texts})
        embedder = TextEmbedder(self.config.embedder)
        vectors = embedder(unique, lambda n, of: self.report(f"queries: {n:,} of {of:,}"))
        table = np.concatenate([vectors, np.full((1, vectors.shape[1]), np.nan, np.float32)])
        place, most = {text: i for i, text in enumerate(unique)}, max(map(len, ways))
        rows = [[place[texts[v % len(texts)]] if texts else -1 for v in range(most)] for texts in ways]
        save_embeddings(self.work / "queries", table[np.array(rows)].reshape(len(ways), -1))
        return f"{len(unique):,} distinct queries"

    def embed_instructions(self) -> str:
        """The instructions that training positions follow, embedded; the timeline itself goes into the bundle."""
        if not self.config.instructions:
            return "none: training follows queries and the learned default"
        timeline = Timeline.load(Path(self.config.instructions))
        train = self.split.train
        told = np.full(train.events, -1, np.int32)
        for u, user in enumerate(train.users):
            start, n = int(train.offsets[u]), int(train.lengths[u])
            told[start : start + n] = timeline.find(user, np.arange(n))
        timeline.save(self.folder / TIMELINE)
        embedder = TextEmbedder(self.config.embedder)
        vectors = embed_texts(
            embedder, timeline.texts, lambda n, of: self.report(f"instructions: {n:,} of {of:,} different texts")
        )
        save_embeddings(self.work / "instructions", vectors)
        with atomic(self.work / "told.safetensors") as path:
            save_file({"told": told}, path)
        return f"{int((told >= 0).sum()):,} of {train.events:,} training positions follow one of {len(timeline):,}"

    def training_data(self, model: GeneratorModel) -> TrainingData:
        from genrec.generator.batches import ScenarioTask, TrainingData

        path = self.work / "queries" / "embeddings.safetensors"
        table = None
        if path.exists():
            table = load_embeddings(path.parent).reshape(len(self.dataset.catalog), -1, model.config.text_dim)
        tasks = []
        for name in self.dataset.scenarios:
            about = SCENARIOS[name]
            if name in SHARES and (table is not None or not about.query):
                mask = target_mask(about, self.split.train, self.dataset.catalog)
                tasks.append(ScenarioTask(name, mask, SHARES[name], about.trigger, about.query))
        ids = {name: i for i, name in enumerate(model.config.scenarios)}
        path, told = self.work / "taught.safetensors", self.work / "told.safetensors"
        return TrainingData(
            self.split.train,
            tuple(tasks),
            ids,
            table,
            model.config.text_dim,
            taught=load_file(path)["taught"] if path.exists() else None,
            told=load_file(told)["told"] if told.exists() else None,
            instructions=load_embeddings(self.work / "instructions") if told.exists() else None,
        )

    def new_generator(self) -> GeneratorModel:
        import torch

        from genrec.generator.config import GeneratorConfig
        from genrec.generator.model import GeneratorModel

        vectors = load_embeddings(self.folder / "tokenizer")
        ids = SemanticIDs.load(self.folder / "tokenizer")
        torch.manual_seed(self.config.seed)
        config = GeneratorConfig(
            items=len(vectors),
            text_dim=vectors.shape[1],
            d_model=self.config.d_model,
            d_ff=4 * self.config.d_model,
            encoder_layers=self.config.layers,
            decoder_layers=self.config.layers,
            max_history=self.config.max_history,
            dropout=self.config.dropout,
            levels=self.config.levels,
            codes=ids.codebooks.shape[1],
            scenarios=list(self.dataset.scenarios),
            recent=self.config.recent,
            retrieved=self.config.retrieved,
            profiles=any(self.split.train.attributes),
        )
        return GeneratorModel(config).set_catalog(ids.trie, torch.from_numpy(vectors))

    def train_generator(self) -> str:
        from training.evaluate import instruction_vectors, rank_generator
        from training.generator import TrainingConfig, train

        model = self.new_generator()
        model.to(fastest_device())  # type: ignore[arg-type]
        settings = TrainingConfig(
            epochs=self.config.epochs,
            positions=self.config.positions,
            learning_rate=self.config.learning_rate,
            seed=self.config.seed,
            bf16=self.config.bf16,
            q2i=self.config.q2i,
            teaching=self.config.teaching,
        )
        sample = self.watched()
        told = instruction_vectors(self.parts(), sample)
        progress: list[Progress] = []

        def say(p: Progress) -> None:
            progress.append(p)
            shown = "" if p.validation is None else f", validation NDCG@10 {p.validation:.4f} (best {p.best:.4f})"
            loss = " + ".join(f"{x:.2f}" for x in p.loss)
            self.report(
                f"generator: step {p.step:,} of {p.steps:,}, loss {loss}, "
                f"{p.positions_per_second:,.0f} positions/s{shown}"
            )

        train(
            model,
            self.training_data(model),
            settings,
            self.work / "generator",
            lambda m: float(ndcg(rank_generator(m, sample, told).ranks, 10).mean()),
            say,
            self.config.checkpoint_seconds,
        )
        model.to("cpu").save_pretrained(self.folder / "generator")  # type: ignore[arg-type]
        best = next((p.best for p in reversed(progress) if p.best is not None), None)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        return f"{parameters:.1f} M parameters" + (f", validation NDCG@10 {best:.4f}" if best is not None else "")

    def watched(self) -> EvalSet:
        """The validation requests by which the best weights of a training run are kept."""
        return self.split.validation.sample(2000, seed=1)

    def parts(self) -> Bundle:
        """The unfinished bundle, to read its finished parts."""
        return Bundle(self.folder, self.identity(), device=fastest_device())

    def choose_weights(self) -> str:
        """The fusion of every scenario, on the validation requests that qualify for it."""
        from training.evaluate import fused_weights, requests_of

        parts, chosen = self.parts(), {}
        for name in self.dataset.scenarios:
            requests = requests_of(parts, self.split, self.split.validation, name)
            sample = requests.sample(WEIGHING if name == HOME else WEIGHING // 4, seed=2)
            if not len(sample) or (SCENARIOS[name].query and self.config.embeddings):
                continue  # served with home's weights
            floors = self.floors_of(name, sample)
            chosen[name] = {"floors": floors, "fused": fused_weights(parts, sample, floors)}
            self.report(f"fusion: {name}, {len(sample):,} validation requests")
        write_json(self.folder / "fusion.json", chosen)
        return ", ".join(f"{name} {w:g}" for name, w in chosen[HOME]["fused"].items() if w)

    def floors_of(self, scenario: str, sample: EvalSet) -> dict[str, float]:
        """The tools' weights in a scenario, on a sample of its validation requests."""
        from training.evaluate import floor_weights

        stored = read_json(self.work / "floors.json")["floors"] if scenario == HOME else None
        return stored or floor_weights(self.parts().tools, sample)

    def make_report(self) -> str:
        from training.evaluate import evaluate_bundles

        return evaluate_bundles([self.parts()], self.split, self.folder / "report", self.report)


def identity_of(config: FitConfig) -> dict[str, Any]:
    """What makes two fits the same, JSON-ready: the settings that matter, the version of genrec, and the content of the
    files that are read ("inputs", a digest each)."""
    settings = {k: v for k, v in config.as_dict().items() if k not in ("out", "checkpoint_seconds")}
    inputs = {}
    for name in ("data", "embeddings", "instructions"):
        path = Path(settings[name].removeprefix("amazon14:")).expanduser()
        if settings[name] and path.exists():
            inputs[name], settings[name] = digest(path), path.name
    return settings | {"inputs": inputs, "genrec": __version__}


def quiet() -> None:
    """Turns off the progress bars of transformers for its own file handling."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def read_embeddings(path: Path, items: int) -> np.ndarray:
    """Own item embeddings [items, D] from a .npy file, scaled to unit length. Raises GenrecError."""
    if not path.is_file():
        raise GenrecError(f"{path}: no such embeddings file")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise GenrecError(f"{path} is not a .npy file of numbers ({error})") from None
    if vectors.ndim != 2 or len(vectors) != items or vectors.dtype.kind != "f":
        raise GenrecError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}; expected floats of shape ({items}, dimensions)"
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise GenrecError(f"{path}: row {bad[0]} is all zeros or holds NaN or infinity")
    return (vectors / norms).astype(np.float32)


def fit(config: FitConfig, report: Report = lambda _: None) -> Path:
    """Makes the bundle of a config; see the module. Returns its folder."""
    return Fit(config, report).run()


def main() -> None:
    """`python -m training.fit` is `genrec fit`."""
    from genrec.cli import main as command

    command(["fit", *sys.argv[1:]])


if __name__ == "__main__":
    main()
