"""The ranking tools by name: which there are, how they are fitted and opened, and what they say of a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genrec.errors import GenrecError

if TYPE_CHECKING:
    import numpy as np

    from genrec.contracts import UserContext
    from genrec.data.dataset import Dataset
    from genrec.tools.marm import MARM
    from genrec.tools.ranking.task import Task
    from genrec.tools.sarm import SARM

RANKERS = ("marm", "sarm")


def make(name: str, task: Task, report: Callable[[str], None], settings: Mapping[str, Any]) -> MARM | SARM:
    """The ranker of that name, fitted. settings: fields of its configs; None, or none, is the default. `anchors`: the
    store of SARM's anchors."""
    from genrec.tools.marm import MARM, MARMConfig
    from genrec.tools.ranking.train import TrainConfig
    from genrec.tools.sarm import SARM, SARMConfig, SARMTraining, anchors_for, stored_anchors

    if name == "marm":
        return MARM.fit(task, filled(MARMConfig, settings), filled(TrainConfig, settings), report)
    stored = stored_anchors(settings["anchors"]) if settings.get("anchors") else {}
    anchors = anchors_for(task.samples.catalog, stored)
    return SARM.fit(task, anchors, filled(SARMConfig, settings), filled(SARMTraining, settings), report)


def train_ranker(
    name: str, rated: Dataset, report: Callable[[str], None], seed: int = 0, apart: np.ndarray | None = None
) -> MARM | SARM:
    """A ranker for the fused list or the rewards, on the ratings given; a tenth of each user's says when to stop.

    apart: bool [M], events that it is not fitted on but knows of, as of the users whom it shall judge: at a request it
    reads how they liked what they had before. Raises GenrecError where there are no ratings of two kinds."""
    import numpy as np

    from genrec.tools.marm import MARM, MARMConfig
    from genrec.tools.ranking.samples import TEST, no_test, rated_samples
    from genrec.tools.ranking.task import Task
    from genrec.tools.ranking.train import TrainConfig, predict

    samples = rated_samples(rated)
    part, lengths = no_test(samples), samples.sequences.lengths
    if apart is not None:
        part = np.where(apart, TEST, part).astype(np.int8)
    settings = {"seed": seed}
    if name == "marm":  # no more room in its cache than is needed
        longest, users = int(lengths.max(initial=1)), int((lengths > 0).sum())
        settings |= {"events": min(MARMConfig.events, longest), "users": users}
    task = Task(samples, part)
    tool = make(name, task, report, settings)
    if isinstance(tool, MARM):  # the states of the events apart are needed too
        predict(tool.model, task, np.flatnonzero(part == TEST), TrainConfig(), tool.memory)
    return tool


def filled(kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """A config of those settings that are its own and were given."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in settings.items() if k in known and v is not None})


def load(name: str, folder: Path) -> MARM | SARM:
    """The tool in a folder."""
    from genrec.tools.marm import MARM
    from genrec.tools.sarm import SARM

    return MARM.load(folder) if name == "marm" else SARM.load(folder)


def open_tool(folder: Path) -> MARM | SARM:
    """The tool in a folder, whichever it is."""
    from genrec.io import check_shape, read_json

    path = folder / "tool.json"
    if not path.is_file():
        raise GenrecError(f"{folder} holds no ranking tool; make one with genrec rank marm fit --out {folder}")
    name = check_shape(path, read_json(path), {"name": str})["name"]
    if name not in RANKERS:
        raise GenrecError(f"{folder} holds {name!r}, which is no ranking tool; there are: {', '.join(RANKERS)}")
    return load(name, folder)


def reasons(tool: MARM | SARM, context: UserContext, rows: list[int]) -> list[dict[str, Any]]:
    """What the command line and the page show of each candidate row, best first: item, title, score, sentence, and
    `events` (MARM: title, share of attention) or `words` (SARM: word, part of the log-odds), JSON-ready."""
    import numpy as np

    titles, out = tool.profile.titles, []
    for reason in tool.explain(context, np.array(rows, np.int64)):
        one: dict[str, Any] = {"item": tool.profile.items[reason.item], "title": titles[reason.item]}
        one |= {"score": round(reason.score, 6), "sentence": reason.sentence}
        if hasattr(reason, "events"):
            one["events"] = [
                {"place": place, "title": titles[row], "share": round(share, 4)} for place, row, share in reason.events
            ]
        else:
            one["words"] = [{"word": word, "worth": round(worth, 4)} for word, worth in reason.words]
            one["anchor"] = reason.anchor
        out.append(one)
    return sorted(out, key=lambda one: -one["score"])
