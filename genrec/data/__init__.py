"""Catalogue and interactions in; splits and scenarios out."""

from genrec.data.dataset import Catalog, Dataset, EvalSet, Sequences
from genrec.data.scenarios import SCENARIOS, Scenario, eval_set, scenario, scenarios_for, tail_items, target_mask
from genrec.data.sources import from_arrow, from_datasets, load_dataset
from genrec.data.splits import Split, chronological, day_slices, k_core, leave_one_out, rolling
from genrec.data.store import read_dataset, save_dataset

__all__ = [
    "SCENARIOS",
    "Catalog",
    "Dataset",
    "EvalSet",
    "Scenario",
    "Sequences",
    "Split",
    "chronological",
    "day_slices",
    "eval_set",
    "from_arrow",
    "from_datasets",
    "k_core",
    "leave_one_out",
    "load_dataset",
    "read_dataset",
    "rolling",
    "save_dataset",
    "scenario",
    "scenarios_for",
    "tail_items",
    "target_mask",
]
