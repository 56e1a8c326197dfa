"""Aligns the generator of a bundle to every scenario's reward: from a bundle to a bundle.

    python -m training.align --help        (the same job as `genrec align`)

OxygenREC (2512.22386): one policy, trained once by SA-GCPO on a unified reward mapping, serves every scenario. The loop
is training.policy, the losses and rewards are genrec.alignment; here are the stages around it. As in a fit, each leaves
a marker when it is whole, a killed alignment goes on where it was, and the finished folder is renamed into place.

The judges (tools, tastes, ratings) are fitted anew, in folds, on other users than those whom they judge. Data, semantic
IDs, tools and stored instructions are the source bundle's own; the fusion is chosen anew, because the generator's part
in it has changed, and the test requests are ranked once, at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec import __version__
from genrec.bundle import MANIFEST, STORE, TIMELINE, Bundle, seal
from genrec.candidates import GENERATOR
from genrec.contracts import HOME
from genrec.data import SCENARIOS, EvalSet, read_dataset
from genrec.data.scenarios import queries
from genrec.errors import GenrecError
from genrec.evaluation.intervals import paired
from genrec.evaluation.metrics import ndcg
from genrec.io import atomic, read_json, remove_temporaries, sha256, write_json, write_text
from genrec.tools import FLOORS, Tool
from serving.models import whole_folder
from training.align_config import AlignConfig
from training.config import FitConfig
from training.evaluate import ALONE_ROW, FUSED_ROW, instruction_vectors, rank_generator, requests_of
from training.fit import SPLITS, Fit, Report

if TYPE_CHECKING:
    from genrec.alignment.judges import Bench
    from genrec.generator.model import GeneratorModel
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM
    from training.policy import Positions

OWN = ("generator", "fusion.json", "report", MANIFEST, f"{STORE}*")  # what an aligned bundle does not take over


class Align(Fit):
    """The stages of one alignment. shared: a folder where judges, queries and teaching are kept for other alignments of
    the same bundle and seed; by default they are this one's own."""

    def __init__(self, settings: AlignConfig, report: Report, shared: Path | None = None) -> None:
        self.settings = settings
        self.source = Bundle.load(settings.bundle)
        if settings.weights and not Path(settings.weights).is_file():
            raise GenrecError(f"{settings.weights}: no such file of reward weights")
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in self.source.config.items()}
        stored: dict[str, Any] = {f.name: kept[f.name] for f in dataclasses.fields(FitConfig) if f.name in kept}
        for name, path in (("embeddings", "tokenizer/embeddings.safetensors"), ("instructions", TIMELINE)):
            stored[name] = str(settings.bundle / path) if stored[name] else ""  # the files that this bundle has of them
        own = {"out": settings.out, "checkpoint_seconds": settings.checkpoint_seconds, "teaching": settings.teaching}
        config = FitConfig(**stored | own)
        super().__init__(config, report)
        self.shared = shared or self.work

    def identity(self) -> dict[str, Any]:
        """The source's config, with what it was aligned by and from."""
        settings = {
            k: v for k, v in self.settings.as_dict().items() if k not in ("bundle", "out", "checkpoint_seconds")
        }
        settings["weights"] = sha256(Path(self.settings.weights)) if self.settings.weights else ""
        source = sha256(self.settings.bundle / MANIFEST)
        return self.source.config | {"aligned": settings | {"bundle": source, "genrec": __version__}}

    def make(self, identity: dict[str, Any]) -> None:
        """Runs the stages and moves the result into place."""
        remove_temporaries(self.work)
        write_json(self.work / "config.json", identity)
        self.prepare()
        self.stage("generator", self.align_generator)
        self.stage("fusion", self.choose_weights)
        self.stage("report", self.make_report)
        seal(self.folder, identity)
        if self.out.exists():
            self.out.rmdir()
        self.folder.replace(self.out)
        self.clear()

    def prepare(self) -> None:
        """What comes before the loop: the bundle's parts, queries, instructions and judges."""
        self.stage("copy", self.copy)
        self.dataset = read_dataset(self.folder / "data")
        self.split = SPLITS[self.config.protocol](self.dataset)
        if self.settings.teaching:
            write_json(self.work / "floors.json", {"floors": self.fusion_of(HOME)})
            self.stage("teaching", self.teach)
        self.stage("queries", self.embed_queries)
        self.stage("instructions", self.embed_instructions)
        for fold in np.unique(self.folds()).tolist():
            self.stage(f"judge-{fold}", partial(self.fit_judge, fold))

    # -- stages -------------------------------------------------------------------------------------

    def copy(self) -> str:
        shutil.copytree(self.source.folder, self.folder, ignore=shutil.ignore_patterns(*OWN), dirs_exist_ok=True)
        (self.folder / "report").mkdir(exist_ok=True)
        for path in (self.source.folder / "report").glob("semantic_ids.json"):
            shutil.copy(path, self.folder / "report")
        store = self.source.folder / STORE
        if store.is_file():  # a copy of one moment, whoever writes into it meanwhile
            with (
                contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as old,
                contextlib.closing(sqlite3.connect(self.folder / STORE)) as new,
            ):
                old.backup(new)
        return f"data, semantic IDs and {len(self.source.config['tools'])} tools of {self.source.folder}"

    def teach(self) -> str:
        return self.once("taught.safetensors", super().teach)

    def embed_queries(self) -> str:
        return self.once("queries", super().embed_queries)

    def once(self, name: str, make: Callable[[], str]) -> str:
        """A file or folder of the work that is the same for all alignments of this bundle and seed: taken over where
        one of them has left it, else made and left for them, whole or not at all."""
        kept, mine = self.shared / name, self.work / name
        if self.shared == self.work:
            return make()
        if kept.exists():
            if kept.is_dir():
                shutil.copytree(kept, mine, dirs_exist_ok=True)
            else:
                shutil.copyfile(kept, mine)
            return "as for the alignments before"
        said = make()
        if mine.is_dir():
            with whole_folder(kept) as temporary:
                shutil.copytree(mine, temporary, dirs_exist_ok=True)
        elif mine.exists():
            with atomic(kept) as temporary:
                shutil.copyfile(mine, temporary)
        return said

    def folds(self) -> np.ndarray:
        from genrec.alignment.judges import folds_of

        return folds_of(self.split.train, seed=self.settings.seed)

    def judging(self) -> dict[str, type[Tool]]:
        """The tools that have a weight in some scenario's fusion."""
        heard = {n for fusion in self.source.weights.values() for n, w in fusion["floors"].items() if w}
        return {name: FLOORS[name] for name in self.source.config["tools"] if name in heard}

    def fit_judge(self, fold: int) -> str:
        from genrec.alignment.judges import Judge

        folder, train = self.shared / "judges" / str(fold), self.split.train
        if not (folder / "judge.safetensors").exists():
            others = train.keep(self.folds()[train.user_of] != fold)
            Judge.fit(others, self.dataset.catalog, self.judging(), self.judging_ranker(fold)).save(folder)
        return (
            f"{', '.join((*self.judging(), *self.config.rankers[:1])) or 'no tool'}, fitted on the other folds' users"
        )

    def judging_ranker(self, fold: int) -> MARM | SARM | None:
        """The bundle's first ranker, fitted anew without the users of the fold, whose own histories it reads."""
        from genrec.tools.rankers import train_ranker

        if not self.config.rankers:
            return None
        train = self.split.train
        rated, apart = replace(self.dataset, sequences=train), self.folds()[train.user_of] == fold
        return train_ranker(self.config.rankers[0], rated, self.report, self.settings.seed, apart)

    def bench(self) -> Bench:
        """The judges of all folds."""
        from genrec.alignment.judges import Bench, Judge

        folds = np.unique(self.folds()).tolist()
        judges = [Judge.load(self.shared / "judges" / str(fold), self.judging()) for fold in folds]
        return Bench.of(judges, self.source.semantic_ids.trie, self.source.embeddings, self.fusion_of, self.split.train)

    def fusion_of(self, scenario: str) -> dict[str, float]:
        """The tools' weights in a scenario, as the source's fit chose them."""
        return self.source.fusion(scenario)["floors"]

    def price_of(self, scenario: str) -> float:
        """What a nat of drift from the start costs in the ranker's scores: as the fused list weighs them."""
        from genrec.alignment.rewards import price_of_drift

        heard = {GENERATOR, *self.source.config["tools"]}  # the rankers have no part in the score that is anchored
        return price_of_drift({n: w for n, w in self.source.fusion(scenario)["fused"].items() if n in heard})

    def floors_of(self, scenario: str, sample: EvalSet) -> dict[str, float]:
        """As in the source: tools and validation requests are the same."""
        return self.fusion_of(scenario)

    def positions(self, model: GeneratorModel) -> Positions:
        """What the loop may ask, with the queries that searches are asked by."""
        from training.policy import Positions

        data = self.training_data(model)
        table = None if data.queries is None else data.queries[:, 0]
        return Positions(data, self.folds(), table)

    def watched(self) -> EvalSet:
        """Other validation requests than those by which a fit picks its weights, where there are as many: on its own a
        start looks better than it is (one that was aligned itself was kept by these)."""
        chosen = super().watched()
        theirs = set(map(id, chosen.contexts))
        others = [i for i, context in enumerate(self.split.validation.contexts) if id(context) not in theirs]
        free = self.split.validation.take(np.array(others, np.int64))
        return free.sample(len(chosen), seed=1) if len(free) >= len(chosen) else chosen

    def watched_in(self) -> dict[str, EvalSet]:
        """The validation requests by which weights are kept, as every scenario asks them.

        Not home's alone, which is what the fit picked the untouched model on. A search is left out: its query is made
        of the wanted item, and its high scores would drown the others.
        """
        parts, home = self.parts(), self.watched()
        names = [n for n in self.dataset.scenarios if not SCENARIOS[n].query]
        found = {name: requests_of(parts, self.split, home, name) for name in names}
        return {name: requests for name, requests in found.items() if len(requests)}

    def align_generator(self) -> str:
        from genrec.alignment.rewards import ScenarioWeights
        from training.policy import Aligner

        model, parts, watched = self.source.generator, self.parts(), self.watched_in()
        told = {name: instruction_vectors(parts, requests) for name, requests in watched.items()}

        users = np.concatenate([requests.users for requests in watched.values()])

        def measure(m: GeneratorModel) -> dict[str, np.ndarray]:
            return {name: ndcg(rank_generator(m, watched[name], told[name]).ranks, 10) for name in watched}

        def evaluate(m: GeneratorModel) -> dict[str, float]:
            found = measure(m)
            whole = np.concatenate(list(found.values()))
            less = paired(whole[:, None], before[:, None], users)[0]
            said = {"ndcg": float(whole.mean()), "low": less.low, "high": less.high}
            return said | {name: float(values.mean()) for name, values in found.items()}

        def say(line: dict[str, Any]) -> None:
            text = f"align: step {line['step']:,} of {self.settings.steps:,}"
            if "reward" in line:
                text += f", reward {line['reward']:.4f}, suppressed {line['suppressed']:.0%}"
            if "validation" in line:
                text += f", validation NDCG@10 {line['validation']['ndcg']:.4f} (kept: {line['best']:.4f})"
            self.report(text)

        run = Aligner(
            model,
            self.positions(model),
            self.bench(),
            ScenarioWeights.load(self.settings.weights),
            self.settings,
            queries(self.dataset.catalog),
            self.price_of,
            self.config.q2i,
        )
        before = np.concatenate(list(measure(model).values()))
        run.run(self.work / "generator", evaluate, say)
        model.to("cpu").save_pretrained(self.folder / "generator")  # type: ignore[arg-type]
        log = (self.work / "generator" / "log.jsonl").read_text(encoding="utf-8")
        write_text(self.folder / "report" / "alignment.jsonl", log)
        return f"{self.settings.loss}, {verdict(log)}"

    def make_report(self) -> str:
        """The table of the aligned bundle, and a plain word on what became of the test results."""
        said = super().make_report()
        before, after = (read_json(f / "report" / "report.json") for f in (self.source.folder, self.folder))
        for system in (ALONE_ROW, FUSED_ROW):
            old, new = (ndcg_of(report, system) for report in (before, after))
            if old is not None and new is not None:
                word = "LOWER than" if new < old else "against"
                said += f"; {system} {new:.4f}, {word} {old:.4f} before"
        return said


def ndcg_of(report: dict[str, Any], system: str) -> float | None:
    """NDCG@10 of a system over all requests, from a report.json; None where it has no row."""
    rows = (r for r in report["rows"] if (r["system"], r["slice"]) == (system, "all"))
    return next((r["metrics"]["NDCG@10"]["mean"] for r in rows), None)


def verdict(log: str) -> str:
    """What validation said of an alignment, from its log: "validation NDCG@10 .1200 -> .1260 at step 96"."""
    lines = [json.loads(line) for line in log.splitlines()]
    found = [line for line in lines if "validation" in line]
    first, kept = found[0]["validation"]["ndcg"], found[-1]["kept"]
    if kept == 0:
        return f"validation NDCG@10 {first:.4f}: no later weights passed the guard, the model stays as it was"
    return f"validation NDCG@10 {first:.4f} -> {found[-1]['best']:.4f} at step {kept}"


def align(config: AlignConfig, report: Report = lambda _: None) -> Path:
    """Makes the aligned bundle of a config; see the module. Returns its folder."""
    return Align(config, report).run()


def main() -> None:
    """`python -m training.align` is `genrec align`."""
    from genrec.cli import main as command

    sys.exit(command(["align", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
