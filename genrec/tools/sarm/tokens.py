"""The two token streams of SARM over the same text (papers/tools.md 2.2), aligned position by position.

Base: a general tokenizer; by default WordPiece of the packaged MiniLM, of which the pieces that the anchors use are
kept; without a package, single characters. Domain: byte-pair encoding run on the anchors themselves, merging across
blanks too, so that what is said often becomes one token ("science fiction"). The paper merges what is seen 100,000
times; `least` scales that to a small corpus. Per position the base token comes with the domain token that covers it
(a repeated one, where it covers several): the paper's alignment is not public.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from genrec.errors import GenrecError
from genrec.tokenizer.embeddings import PACKAGED, packaged_minilm

PAD, UNKNOWN = 0, 1
CHARACTERS = "characters"


@dataclass(frozen=True)
class Tokens:
    """Encoded anchors. base, domain: int32 [N, T], PAD at the end; words: per item the text of each position."""

    base: np.ndarray
    domain: np.ndarray
    words: list[list[str]]


def base_tokenizer(name: str = PACKAGED) -> Tokenizer:
    """A general tokenizer: "packaged" (MiniLM's), "characters", or a folder or file with a tokenizer.json."""
    if name == CHARACTERS:
        made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return made
    path = packaged_minilm() if name == PACKAGED else Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        found = Tokenizer.from_file(str(path))
    except Exception:  # the package raises bare Exceptions
        raise GenrecError(f"{path} is no readable tokenizer.json") from None
    found.no_padding()
    found.no_truncation()
    return found


def domain_tokenizer(texts: Sequence[str], vocabulary: int = 2000, least: int = 20) -> Tokenizer:
    """BPE on the anchors, lower case; merges stay inside a field and may cross blanks. least: how often a pair must be
    seen to be merged."""
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(" ; ", "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=least, special_tokens=["[PAD]", "[UNK]"], show_progress=False,
        limit_alphabet=200,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return made


class TokenStreams:
    """Both tokenizers and the base pieces in use. known: base piece -> id from 2 on."""

    def __init__(self, base: Tokenizer, domain: Tokenizer, known: dict[str, int], longest: int) -> None:
        self.base, self.domain, self.known, self.longest = base, domain, known, longest

    @classmethod
    def fit(
        cls, texts: Sequence[str], base: str = PACKAGED, vocabulary: int = 2000, least: int = 20, longest: int = 48
    ) -> TokenStreams:
        """texts: one anchor per item of the training catalogue; longest: positions kept of a text."""
        if longest < 1 or vocabulary < 2 or least < 1:
            raise GenrecError(
                f"longest {longest}, vocabulary {vocabulary} and least {least} must be 1, 2 and 1 or more"
            )
        general, domain = base_tokenizer(base), domain_tokenizer(texts, vocabulary, least)
        pieces = dict.fromkeys(p for t in texts for p, _ in _pieces(general, t))
        return cls(general, domain, {piece: i + 2 for i, piece in enumerate(pieces)}, longest)

    @property
    def sizes(self) -> tuple[int, int]:
        """Vocabulary of base and domain, PAD and UNKNOWN included."""
        return len(self.known) + 2, max(2, self.domain.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Empty texts have no tokens."""
        base = np.full((len(texts), self.longest), PAD, np.int32)
        domain = np.full((len(texts), self.longest), PAD, np.int32)
        words: list[list[str]] = []
        for i, text in enumerate(texts):
            pieces = _pieces(self.base, text)[: self.longest]
            base[i, : len(pieces)] = [self.known.get(piece, UNKNOWN) for piece, _ in pieces]
            covers = np.full(len(text) + 1, UNKNOWN, np.int32)
            encoded = self.domain.encode(text, add_special_tokens=False)
            for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
                covers[start:end] = number
            domain[i, : len(pieces)] = [covers[start] for _, (start, _) in pieces]
            words.append([_word(text, start, end) for _, (start, end) in pieces])
        return Tokens(base, domain, words)

    def merged(self) -> list[str]:
        """The domain's tokens of more than one word, for a report."""
        return sorted(t for t in self.domain.get_vocab() if " " in t.strip() and ";" not in t)

    def as_json(self) -> dict[str, Any]:
        return {
            "base": json.loads(self.base.to_str()),
            "domain": json.loads(self.domain.to_str()),
            "known": list(self.known),
            "longest": self.longest,
        }

    @classmethod
    def from_json(cls, value: Any, where: Path) -> TokenStreams:
        """Raises GenrecError where `value` is not what as_json gives."""
        try:
            base, domain = (Tokenizer.from_str(json.dumps(value[name])) for name in ("base", "domain"))
            known = {str(piece): i + 2 for i, piece in enumerate(value["known"])}
            return cls(base, domain, known, int(value["longest"]))
        except Exception:  # the package raises bare Exceptions
            raise GenrecError(f"{where} holds no tokenizers or is damaged; fit the tool again") from None


def _pieces(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    """(piece, span) of each token with characters of its own; in a tokenizer without vocabulary, the characters."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.get_vocab_size() <= 1
    found = zip(encoded.tokens, encoded.offsets, strict=True)
    return [((text[a:b].lower() if unknown else piece), (a, b)) for piece, (a, b) in found if b > a]


def _word(text: str, start: int, end: int) -> str:
    """The whole word that a piece belongs to."""
    while start > 0 and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end].isalnum():
        end += 1
    return text[start:end].strip()
