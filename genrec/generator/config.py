"""The fast thinker's configuration, saved as config.json beside its weights."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

DEFAULT_SCENARIOS = ["home", "item", "search", "favourites", "discovery"]


class GeneratorConfig(PretrainedConfig):
    """Sizes of the encoder-decoder. Every default is ours: the paper's smallest model has 0.1 B parameters.

    items: catalogue size the weights were made for. text_dim: width of item and instruction embeddings.
    d_model, heads, d_ff, encoder_layers, decoder_layers: the usual. max_history: newest events that the
    encoder reads. dropout: one mask per sequence and feature, shared by its positions (cheap on a CPU).
    scenarios: names in the order of their embeddings. retrieved: events that the request's instruction chooses out of
    the history beyond the `recent` newest (see igr.py); 0 turns that off, and the decoder sees the whole history.
    retrieval_width: of the space they are compared in. profiles: the encoder reads users' attributes (see profile.py).
    """

    model_type = "genrec-generator"

    def __init__(
        self,
        items: int = 0,
        text_dim: int = 384,
        d_model: int = 128,
        heads: int = 4,
        d_ff: int = 512,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        max_history: int = 50,
        dropout: float = 0.2,
        levels: int = 3,
        codes: int = 128,
        scenarios: list[str] | None = None,
        recent: int = 20,
        retrieved: int = 0,
        retrieval_width: int = 64,
        profiles: bool = False,
        **kwargs: Any,
    ) -> None:
        self.items = items
        self.text_dim = text_dim
        self.d_model = d_model
        self.heads = heads
        self.d_ff = d_ff
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.max_history = max_history
        self.dropout = dropout
        self.levels = levels
        self.codes = codes
        self.scenarios = list(scenarios) if scenarios is not None else list(DEFAULT_SCENARIOS)
        self.recent = recent
        self.retrieved = retrieved
        self.retrieval_width = retrieval_width
        self.profiles = profiles
        super().__init__(**kwargs)
