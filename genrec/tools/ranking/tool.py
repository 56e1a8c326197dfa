"""What the ranking tools share around their models: who the users are, what they said of their history, files.

A `Profile` holds what was known when the tool was fitted. At a request, a known user's events that stand in the context
at their own places bring their feedback; other events have none. Nothing is fitted at a request.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from genrec import io
from genrec.contracts import UserContext
from genrec.errors import GenrecError
from genrec.tools.base import short_title
from genrec.tools.ranking.task import Batch, Rates, Task, request_batch

MOST = 10_000  # candidates of one request


@dataclass(frozen=True)
class Profile:
    """items, titles [N]; users [U] with their events offsets[u]:offsets[u+1] as rows and feedback int8 [M, T]; names of
    the labels; rates: see there; later: feedback of a user's events after the fit, place -> (row, feedback [T])."""

    items: list[str]
    titles: list[str]
    users: list[str]
    offsets: np.ndarray
    rows: np.ndarray
    feedback: np.ndarray
    names: tuple[str, ...]
    rates: Rates
    later: dict[str, dict[int, tuple[int, list[float]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> Profile:
        s = task.samples.sequences
        titles = [short_title(t) for t in task.samples.catalog.titles]
        return cls(
            task.samples.catalog.items, titles, s.users, s.offsets, s.items.astype(np.int32),
            task.feedback.astype(np.int8), task.samples.names, task.rates,
        )  # fmt: skip

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {user: u for u, user in enumerate(self.users)}

    def said(self, context: UserContext) -> np.ndarray:
        """Feedback float32 [len(history), T] of a context: 0 where it is not known."""
        out = np.zeros((len(context.history), len(self.names)), np.float32)
        u = self.numbers.get(context.user or "")
        if u is not None:
            start, end = int(self.offsets[u]), int(self.offsets[u + 1])
            n = min(end - start, len(out))
            same = self.rows[start : start + n] == np.asarray(context.history[:n], np.int32)
            out[:n] = self.feedback[start : start + n] * same[:, None]
        for place, (row, feedback) in self.later.get(context.user or "", {}).items():
            if place < len(out) and context.history[place] == row:
                out[place] = feedback
        return out

    def tell(self, context: UserContext, row: int, labels: np.ndarray) -> None:
        """Takes note of what a user said of an item shown next in a context: labels float [T], 1 yes, 0 no, NaN
        unknown. Nothing for a stranger, whose history is nobody's."""
        user = context.user or ""
        if user in self.numbers:
            said = np.nan_to_num(2 * np.asarray(labels, np.float64) - 1).tolist()
            self.later.setdefault(user, {})[len(context.history)] = (int(row), said)

    def batch(self, contexts: list[UserContext], items: np.ndarray, n: int) -> Batch:
        """The requests as tensors. items: int [B, C], -1 as padding. Raises GenrecError for rows that are none."""
        items = np.asarray(items, np.int64)
        if items.ndim != 2 or len(items) != len(contexts):
            raise GenrecError(f"candidates must be rows [{len(contexts)}, C], not of shape {items.shape}")
        if items.shape[1] > MOST:
            raise GenrecError(f"{items.shape[1]} candidates are too many for one request; at most {MOST} are scored")
        known = len(self.items)
        rows = [*items.ravel().tolist(), *(r for c in contexts for r in c.history)]
        if rows and not (min(rows) >= -1 and max(rows) < known):
            raise GenrecError(f"an item row is outside of the {known} items that the tool was fitted on")
        users = [self.numbers.get(c.user or "", -1) for c in contexts]
        return request_batch(contexts, items, n, self.rates, users, [self.said(c) for c in contexts], len(self.users))

    def save(self, folder: Path) -> None:
        arrays = {
            "offsets": self.offsets, "rows": self.rows, "feedback": self.feedback, "prior": self.rates.prior,
            "item_yes": self.rates.item_yes, "item_known": self.rates.item_known, "gap": np.array([self.rates.gap]),
        }  # fmt: skip
        with io.atomic(folder / "profile.safetensors") as temporary:
            save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, temporary)
        later = {u: [[p, row, said] for p, (row, said) in x.items()] for u, x in self.later.items()}
        about = {"items": self.items, "titles": self.titles, "users": self.users, "names": list(self.names)}
        io.write_json(folder / "profile.json", about | {"later": later})

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Raises GenrecError where a file is missing or damaged."""
        shape = {"items": list, "titles": list, "users": list, "names": list, "later": dict}
        about = io.check_shape(folder / "profile.json", io.read_json(folder / "profile.json"), shape)
        a = read_arrays(folder / "profile.safetensors")
        try:
            rates = Rates(a["prior"], a["item_yes"], a["item_known"], float(a["gap"][0]))
            names = tuple(about["names"])
            later = {u: {int(p): (int(row), list(said)) for p, row, said in x} for u, x in about["later"].items()}
            return cls(
                about["items"], about["titles"], about["users"], a["offsets"], a["rows"], a["feedback"], names, rates,
                later,
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError):
            raise GenrecError(f"{folder / 'profile.json'} is damaged; fit the tool again") from None
        except KeyError as error:
            raise GenrecError(
                f"{folder / 'profile.safetensors'} is damaged: {error} is missing; fit the tool again"
            ) from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. Raises GenrecError where it is missing or damaged."""
    try:
        return dict(load_file(path))
    except (FileNotFoundError, SafetensorError) as error:
        raise GenrecError(f"{path} is missing or damaged ({error}); fit the tool again") from None


def save_model(folder: Path, name: str, model: nn.Module, about: dict[str, Any]) -> str:
    """Writes model.safetensors and tool.json (name, config, about); returns the digest of the weights, by which others
    know this model."""
    with io.atomic(folder / "model.safetensors") as temporary:
        save_tensors({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    version = io.sha256(folder / "model.safetensors")
    config: Any = model.config
    io.write_json(folder / "tool.json", {"name": name, "version": version, "config": asdict(config)} | about)
    return version


def load_about(folder: Path, name: str) -> dict[str, Any]:
    """tool.json of a folder. Raises GenrecError where it is missing, damaged or of another tool."""
    path = folder / "tool.json"
    about = io.check_shape(path, io.read_json(path), {"name": str, "version": str, "config": dict})
    if about["name"] != name:
        raise GenrecError(f"{path} holds the tool {about['name']!r}, not {name!r}")
    if not (folder / "model.safetensors").is_file() or io.sha256(folder / "model.safetensors") != about["version"]:
        raise GenrecError(
            f"{folder / 'model.safetensors'} is missing or not the one that was saved; fit the tool again"
        )
    return about


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fills a model. Raises GenrecError where the weights are of other sizes."""
    try:
        model.load_state_dict(load_tensors(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise GenrecError(f"{folder} holds the weights of another version ({reason}); fit the tool again") from None
    model.eval()


def masked(scores: np.ndarray, items: np.ndarray) -> np.ndarray:
    """float32 [B, C], -inf where padded."""
    return np.where(np.asarray(items) < 0, -np.inf, scores).astype(np.float32)


def scored(rates: torch.Tensor) -> np.ndarray:
    """Probabilities float32 out of logits."""
    return torch.sigmoid(rates).numpy().astype(np.float32)
