from __future__ import annotations

import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.tokenizer.embeddings import TextEmbedder


def test_the_packaged_model_knows_what_is_near() -> None:
    seen: list[tuple[int, int]] = []
    texts = ["red nail polish", "nail lacquer, crimson", "a film about war", "x" * 5000, ""]
    vectors = TextEmbedder()(texts, lambda done, total: seen.append((done, total)))
    assert vectors.shape == (5, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert seen[-1] == (5, 5)


def test_an_unknown_model_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(GenrecError, match="cannot load the text embedder") as error:
        TextEmbedder(str(tmp_path / "nothing"))(["x"])
    assert "\n" not in str(error.value)
