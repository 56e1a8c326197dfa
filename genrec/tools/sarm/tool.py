"""SARM as a tool: items read as natural language that the ranking loss trains (papers/tools.md section 2, 7.2).

Away from the request anchors are written, and the encoder fills the bank (`fit`, `add`); at the request `score` reads
the bank. What words carried a score comes from the bank too: for each item it keeps the WORDS words that the identity
attends to most, with their part of h_TAR, and the gradient of the score tells what each part was worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.numpy import save_file

from genrec import io
from genrec.contracts import UserContext
from genrec.device import fastest_device
from genrec.errors import GenrecError
from genrec.tokenizer.embeddings import PACKAGED
from genrec.tools.base import short_title
from genrec.tools.ranking.reward import ranking_reward
from genrec.tools.ranking.task import Task
from genrec.tools.ranking.tool import Profile, load_about, load_weights, masked, read_arrays, save_model, scored
from genrec.tools.ranking.train import Report
from genrec.tools.sarm.anchors import Anchor
from genrec.tools.sarm.model import Bank, SARMModel, SARMModelConfig, fill_bank, make_bank
from genrec.tools.sarm.tokens import Tokens, TokenStreams
from genrec.tools.sarm.train import SARMTraining, train
from genrec.tools.sarm.warm import warm_start

WORDS = 8
STOP = frozenset(("a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to"))


@dataclass(frozen=True)
class SARMConfig:
    """Sizes of the model and its tokens. Ours, and not tuned yet (docs/ranking-tools.md)."""

    d: int = field(default=32, metadata={"help": "width"})
    events: int = field(default=50, metadata={"help": "newest events that a request reads"})
    recent: int = field(default=20, metadata={"help": "items on the user side (m)"})
    stream: str = field(default="gate", metadata={"help": "tokens", "choices": ("base", "domain", "gate")})
    tokenizer: str = field(default="packaged", metadata={"help": "base tokenizer: packaged, characters or a file"})
    vocabulary: int = field(default=2000, metadata={"help": "largest vocabulary of the domain tokenizer"})
    least: int = field(default=20, metadata={"help": "how often a pair is seen before it is merged"})
    longest: int = field(default=48, metadata={"help": "tokens read of an anchor"})


@dataclass(frozen=True)
class Carried:
    """Why a candidate got its score. words: (word, what it added to the main label's log-odds), the largest first."""

    item: int
    score: float
    words: tuple[tuple[str, float], ...]
    anchor: str
    sentence: str


@dataclass(frozen=True)
class Words:
    """Per item of the bank the words that its identity attends to most, "" where there are fewer, and each one's part
    of h_TAR, float16 [R, WORDS, d]."""

    texts: list[list[str]]
    parts: np.ndarray


class SARM:
    """See the module's text. Implements genrec.contracts.Ranker."""

    name = "sarm"

    def __init__(
        self, model: SARMModel, profile: Profile, bank: Bank, words: Words, anchors: list[str], streams: TokenStreams
    ) -> None:
        self.model, self.profile, self.bank = model.eval(), profile, bank
        self.words, self.anchors, self.streams = words, anchors, streams

    @classmethod
    def fit(
        cls,
        task: Task,
        anchors: Sequence[Anchor],
        config: SARMConfig | None = None,
        training: SARMTraining | None = None,
        report: Report = lambda _: None,
    ) -> Self:
        """anchors: one per catalogue row (genrec.tools.sarm.anchors.anchors_for)."""
        config, training = config or SARMConfig(), training or SARMTraining()
        if len(anchors) != task.items:
            raise GenrecError(f"{len(anchors)} anchors were given for {task.items} items")
        texts = [anchor.text for anchor in anchors]
        streams = TokenStreams.fit(texts, config.tokenizer, config.vocabulary, config.least, config.longest)
        base, domain = streams.sizes
        torch.manual_seed(training.seed)
        sizes = SARMModelConfig(
            task.users, task.items, task.tasks, task.width, base_tokens=base, domain_tokens=domain,
            stream=config.stream, d=config.d, n=config.events, m=config.recent,
        )  # fmt: skip
        model = SARMModel(sizes)
        if config.tokenizer == PACKAGED:
            warm_start(model.encoder, streams)
        tokens = streams.encode(texts)
        model.to(fastest_device())
        trained = train(model, task, tokens, training, report=report)
        model, bank = model.to("cpu"), trained.bank.to("cpu")  # a request at a time is quick there
        words = attended(model, bank, tokens, np.arange(task.items))
        return cls(model, Profile.of(task), bank, words, texts, streams)

    def rates(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
        """Predicted rates of every label, float32 [B, C, T]; items: rows [B, C], -1 as padding. Reads the bank only."""
        if not contexts:
            return np.zeros((0, *np.shape(items)[1:], len(self.profile.names)), np.float32)
        with torch.no_grad():
            return scored(self.model.score(self.profile.batch(contexts, items, self.model.config.n), self.bank))

    def score(
        self, contexts: list[UserContext], items: np.ndarray, weights: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """float32 [B, C]: the reward of the predicted rates (the main label's where no weights are given)."""
        return masked(ranking_reward(self.rates(contexts, items), self.profile.names, weights), items)

    def explain(self, context: UserContext, items: np.ndarray, most: int = 3) -> list[Carried]:
        """A reason for each candidate row of one request, [C]."""
        items = np.asarray(items, np.int64)[None]
        batch = self.profile.batch([context], items, self.model.config.n)
        tar = self.bank.tar[batch.item].clone().requires_grad_()
        logits = self.model.score(batch, self.bank, tar=tar)[0, :, 0]
        (slope,) = torch.autograd.grad(logits.sum(), tar)
        scores = scored(logits.detach())
        out = []
        for c, row in enumerate(items[0].tolist()):
            if row < 0:
                out.append(Carried(row, float("-inf"), (), "", "No item stands here."))
                continue
            worth = self.words.parts[row].astype(np.float32) @ slope[0, c].numpy()
            each: dict[str, float] = {}
            for word, value in zip(self.words.texts[row], worth, strict=True):
                if word:
                    each[word] = each.get(word, 0.0) + float(value)
            found = tuple(sorted(each.items(), key=lambda x: -x[1])[:most])
            said = self._sentence(row, float(scores[c]), found)
            out.append(Carried(row, float(scores[c]), found, self.anchors[row], said))
        return out

    def _sentence(self, row: int, score: float, words: Sequence[tuple[str, float]]) -> str:
        said = f"{self.profile.titles[row]}: {self.profile.names[0]} {score:.0%}"
        carried = ", ".join(f"{word} ({value:+.2f})" for word, value in words if value > 0)
        return (
            f"{said}, carried by the words {carried}." if carried else f"{said}; no word of its anchor speaks for it."
        )

    def add(self, items: Sequence[str], titles: Sequence[str], anchors: Sequence[Anchor]) -> np.ndarray:
        """Takes up new items by their anchors alone and returns their rows: they have no identifier vector and no rates
        until the next fit. Runs the encoder, so it belongs beside the request. Raises GenrecError for an item that is
        there."""
        if there := sorted(set(items) & set(self.profile.items)):
            raise GenrecError(f"item {there[0]!r} is in the bank already")
        if len(set(items)) < len(items) or not len(items) == len(titles) == len(anchors):
            raise GenrecError("new items must differ, each with a title and an anchor")
        texts = [anchor.text for anchor in anchors]
        tokens = self.streams.encode(texts)
        unknown = np.full(len(items), self.model.config.items)
        more = make_bank(self.model, tokens.base, tokens.domain, unknown)
        words = attended(self.model, more, tokens, np.arange(len(items)))
        first, rates, none = (
            len(self.profile.items),
            self.profile.rates,
            np.zeros((len(items), len(self.profile.names))),
        )
        self.bank = Bank(
            *(torch.cat([a[:-1], b]) for a, b in zip(vars(self.bank).values(), vars(more).values(), strict=True))
        )
        self.words = Words(self.words.texts + words.texts, np.concatenate([self.words.parts, words.parts]))
        self.anchors = self.anchors + texts
        self.profile = replace(
            self.profile,
            items=[*self.profile.items, *items],
            titles=[*self.profile.titles, *map(short_title, titles)],
            rates=replace(
                rates,
                item_yes=np.concatenate([rates.item_yes, none]),
                item_known=np.concatenate([rates.item_known, none]),
            ),
        )
        return np.arange(first, first + len(items))

    def rewrite(self, rows: np.ndarray, anchors: Sequence[Anchor]) -> None:
        """New anchors for items that are there: their bank rows are made anew, beside the request."""
        texts = [anchor.text for anchor in anchors]
        tokens = self.streams.encode(texts)
        part = Bank(
            torch.cat([self.bank.ids[rows], self.bank.ids[-1:]]),
            *(torch.zeros(len(rows) + 1, self.model.config.d) for _ in range(2)),
        )
        fill_bank(self.model, part, tokens.base, tokens.domain, np.arange(len(rows)))
        self.bank.cls[rows], self.bank.tar[rows] = part.cls[:-1], part.tar[:-1]
        words = attended(self.model, part, tokens, np.arange(len(rows)))
        for at, row in enumerate(np.asarray(rows).tolist()):
            self.anchors[row], self.words.texts[row], self.words.parts[row] = (
                texts[at],
                words.texts[at],
                words.parts[at],
            )

    def save(self, folder: Path) -> None:
        """Writes model, profile, bank, words and tokenizers."""
        io.check_writable(folder)
        version = save_model(folder, self.name, self.model, {})
        self.profile.save(folder)
        arrays = {k: v.numpy() for k, v in vars(self.bank).items()} | {"words": self.words.parts}
        with io.atomic(folder / "bank.safetensors") as temporary:
            save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, temporary, {"model": version})
        about = {"words": self.words.texts, "anchors": self.anchors, "model": version}
        io.write_json(folder / "anchors.json", about)
        io.write_json(folder / "tokenizers.json", self.streams.as_json())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote. Raises GenrecError for what is missing, damaged or of another model."""
        folder = Path(folder)
        about = load_about(folder, cls.name)
        try:
            model = SARMModel(SARMModelConfig(**about["config"]))
        except TypeError as error:
            raise GenrecError(f"{folder / 'tool.json'} is of another version ({error}); fit the tool again") from None
        load_weights(folder, model)
        profile = Profile.load(folder)
        path = folder / "anchors.json"
        texts = io.check_shape(path, io.read_json(path), {"words": list, "anchors": list, "model": str})
        a = read_arrays(folder / "bank.safetensors")
        if texts["model"] != about["version"]:
            raise GenrecError(f"{path} and the bank beside it are of another model; fit the tool again")
        rows = len(profile.items)
        shapes: dict[str, tuple[Any, ...]] = {"ids": (rows + 1,), "cls": (rows + 1, model.config.d)}
        if any(a.get(k) is None or a[k].shape != v for k, v in shapes.items()) or len(texts["anchors"]) != rows:
            raise GenrecError(f"{folder / 'bank.safetensors'} is damaged or of another model; fit the tool again")
        bank = Bank(*(torch.from_numpy(a[k]) for k in ("ids", "cls", "tar")))
        tokenizers = folder / "tokenizers.json"
        streams = TokenStreams.from_json(io.read_json(tokenizers), tokenizers)
        return cls(model, profile, bank, Words(texts["words"], a["words"]), texts["anchors"], streams)

    def settings(self) -> dict[str, Any]:
        """The model's sizes, for a report."""
        return asdict(self.model.config)


@torch.no_grad()
def attended(model: SARMModel, bank: Bank, tokens: Tokens, rows: np.ndarray, chunk: int = 256) -> Words:
    """The words that each item's identity attends to most. Runs the encoder, beside the request."""
    model.eval()
    texts: list[list[str]] = []
    parts = np.zeros((len(rows), WORDS, model.config.d), np.float16)
    for at in np.split(rows, range(chunk, len(rows), chunk)):
        base, domain = torch.from_numpy(tokens.base[at]), torch.from_numpy(tokens.domain[at])
        _, _, shares, values = model.encode(base, domain, bank.ids[at])
        for i, row in enumerate(at.tolist()):
            each: dict[str, list[int]] = {}
            for position, word in enumerate(tokens.words[row], start=1):
                if any(ch.isalnum() for ch in word) and word.lower() not in STOP:
                    each.setdefault(word, []).append(position)
            best = sorted(each, key=lambda w: -float(shares[i, each[w]].sum()))[:WORDS]
            for place, word in enumerate(best):
                share = shares[i, each[word], None] * values[i, each[word]]
                parts[len(texts), place] = share.sum(0).numpy()
            texts.append(best + [""] * (WORDS - len(best)))
    return Words(texts, parts)
