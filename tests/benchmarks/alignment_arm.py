"""One arm of the comparison of policy losses (compare_alignment.py): a bundle, and what is measured of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from arms import MADE_ON

from genrec.alignment.judges import Bench, Judge, satisfactions, taste_vectors
from genrec.alignment.rewards import ScenarioWeights, judge
from genrec.bundle import Bundle
from genrec.candidates import allowed_items
from genrec.contracts import HOME
from genrec.data import SCENARIOS, EvalSet
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import Ranked
from genrec.evaluation.report import machine
from genrec.io import atomic, write_json
from genrec.state import CHECKPOINT
from training.align import Align
from training.evaluate import (
    ALONE_ROW,
    FUSED_ROW,
    WIDTH,
    fused_weights,
    instruction_vectors,
    rank_generator,
    rank_systems,
    requests_of,
)

if TYPE_CHECKING:
    from genrec.generator.model import GeneratorModel

UNTOUCHED, OURS = "untouched", "sa-gcpo"
WHOLE = (UNTOUCHED, OURS)  # arms that are measured with the tools too, and under every instruction
GUARDED, LAST, FUSED = "guarded", "last", "fused"
LIST = 10


class AlignmentArm(Align):
    """One arm, a bundle of its own. asked: at most so many test requests of each scenario are judged."""

    name = OURS
    asked = 500

    def align_generator(self) -> str:
        write_json(self.folder / "report" / MADE_ON, machine())
        if self.name != UNTOUCHED:
            return super().align_generator()
        self.source.generator.save_pretrained(self.folder / "generator")
        return "the start"

    def choose_weights(self) -> str:
        """Home's fusion alone, and only where it is measured."""
        floors = self.fusion_of(HOME)
        fused = {"generator": 1.0}
        if self.name in WHOLE:
            fused = fused_weights(self.parts(), self.split.validation.sample(8000, seed=2), floors)
        write_json(self.folder / "fusion.json", {HOME: {"floors": floors, "fused": fused}})
        return ", ".join(f"{name} {w:g}" for name, w in fused.items() if w)

    def make_report(self) -> str:
        """Ranks and lists of the test requests by the guarded and the last weights, and what each scenario's lists
        earn."""
        parts, test = self.parts(), self.split.test
        told = instruction_vectors(parts, test)
        if self.name in WHOLE:
            ranked = {r.system: r for r in rank_systems(parts, test)}
            self.keep(FUSED, ranked[FUSED_ROW])
            alone = ranked[ALONE_ROW]
        else:
            alone = rank_generator(parts.generator, test, told, WIDTH)
        self.keep(GUARDED, alone, self.scenario_rewards(parts, parts.generator))
        said = f"test NDCG@10 {ndcg(alone.ranks, 10).mean():.4f}"
        model = self.last()
        if model is None:  # the guarded weights are the last ones
            for path in (self.folder / "report").glob(f"{GUARDED}-*"):
                shutil.copy(path, path.with_name(path.name.replace(GUARDED, LAST)))
            return said
        self.keep(LAST, rank_generator(model, test, told, WIDTH), self.scenario_rewards(parts, model))
        return said

    def keep(self, what: str, ranked: Ranked, rewards: dict[str, np.ndarray] | None = None) -> None:
        folder = self.folder / "report"
        np.save(folder / f"{what}-ranks.npy", ranked.ranks)
        np.save(folder / f"{what}-lists.npy", ranked.lists)
        if rewards is not None:
            with atomic(folder / f"{what}-rewards.npz") as path, path.open("wb") as file:
                np.savez(file, **rewards)

    def last(self) -> GeneratorModel | None:
        """The generator with the averaged weights of the last step; None where they are the guarded ones."""
        import torch
        from safetensors import safe_open

        path = self.work / "generator" / CHECKPOINT
        if self.name == UNTOUCHED:
            return None
        with safe_open(path, "pt") as f, torch.no_grad():
            if f.metadata()["kept"] == f.metadata()["step"]:
                return None
            model = self.parts().generator
            for name, p in model.named_parameters():
                p.copy_(f.get_tensor(f"average.{name}"))
        return model

    def scenario_rewards(self, parts: Bundle, model: GeneratorModel) -> dict[str, np.ndarray]:
        """The mean reward in the scenario `asked` of the ten items that the generator gives each of its requests under
        the instruction of the scenario `told`, "asked/told" -> float32 [B]; "asked/users" -> int [B] and "asked/place",
        see `places`."""
        weights, items, train = ScenarioWeights.load(), len(parts.dataset.catalog), self.split.train
        whole = Judge(parts.tools, taste_vectors(train, items), satisfactions(train, items))
        bench = Bench.of([whole], parts.semantic_ids.trie, parts.embeddings, self.fusion_of, train)
        out: dict[str, np.ndarray] = {}
        for asked in parts.dataset.scenarios:
            requests = requests_of(parts, self.split, self.split.test, asked).sample(self.asked, seed=3)
            out |= {f"{asked}/users": requests.users, f"{asked}/place": places(requests, self.split.test)}
            vectors = self.query_vectors(parts, requests, asked)
            allowed, nobody = allowed_items(requests.contexts, items), np.zeros(len(requests), np.int64)
            context = bench.context(requests.contexts, requests.targets, nobody, allowed, vectors)
            for told in parts.dataset.scenarios if self.name in WHOLE else (asked,):
                own = vectors if told == asked else None
                lists = rank_generator(model, as_in(requests, told), own).lists[:, :LIST].astype(np.int64)
                earned = judge(lists, context, weights).total
                out[f"{asked}/{told}"] = np.where(lists >= 0, earned, 0).mean(1).astype(np.float32)
        return out

    def query_vectors(self, parts: Bundle, requests: EvalSet, scenario: str) -> np.ndarray | None:
        """The queries of a search, embedded once for all arms of a seed; None for other scenarios."""
        path = self.shared / f"{scenario}-asked-{len(requests)}.npy"
        if not SCENARIOS[scenario].query:
            return None
        if not path.exists():
            vectors = instruction_vectors(parts, requests)
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
        return np.load(path)


def places(requests: EvalSet, among: EvalSet) -> np.ndarray:
    """int64 [B]: how many requests of the same user in `among` are older than each of these."""
    known: dict[int, list[int]] = {}
    for user, context in zip(among.users.tolist(), among.contexts, strict=True):
        known.setdefault(user, []).append(len(context.history))
    pairs = zip(requests.users.tolist(), requests.contexts, strict=True)
    return np.array([sum(n < len(c.history) for n in known[u]) for u, c in pairs], np.int64)


def as_in(requests: EvalSet, scenario: str) -> EvalSet:
    """The same requests as another scenario would tell them: its name, its trigger, and a query for a search that has
    one already."""
    about = SCENARIOS[scenario]
    contexts = [
        replace(
            c,
            scenario=scenario,
            trigger=c.history[-1] if about.trigger and c.history else None,
            query=c.query if about.query else None,
        )
        for c in requests.contexts
    ]
    return replace(requests, contexts=contexts)
