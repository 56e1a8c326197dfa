"""The fast thinker: history in, semantic IDs out, steered by a scenario and an instruction.

OxygenREC (2512.22386): an encoder-decoder with P(Y | X, I_s, I_r); the decoder's prefix is
[BOS, I_s, I_r], the place to the right of BOS that the paper found best. I_s is the scenario with its
optional trigger item in one token; I_r is a text embedding through an adapter, or a learned default.

Ours, where the paper is silent:
- BOS carries the newest event, in a projection of its own: what was done last says most about what comes next, and
  attention alone finds it late in training.
- The profile, where the data knows attributes of users, stands at the head of the encoder's output (profile.py).
- One encoder position per event: its code embeddings, a projection of its text embedding, an item
  embedding (absent for new items), time gap and weight, summed. The encoder is causal, so that one pass
  trains every position of a sequence.
- A next-code distribution is normalised over the legal codes only, in training and in search alike
  ("legal normalisation"): P(item) is then a proper distribution over the catalogue.
- A code's output embedding depends on where it stands in the tree: code embedding plus a projection of the
  mean text embedding of the items below that node; leaves add the item's own output embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from genrec.generator.children import child_logits
from genrec.generator.config import GeneratorConfig
from genrec.generator.igr import InstructionRetrieval, keep
from genrec.generator.layers import LANES, MASKED, DecoderLayer, EncoderLayer, Grid, LayerState
from genrec.generator.profile import BUCKETS
from genrec.tokenizer.trie import Trie

T = TypeVar("T")
GAP_BUCKETS = 16
UNKNOWN_GAP = GAP_BUCKETS - 1
DAY = 86400.0
PREFIX = 3  # BOS, scenario, instruction


@dataclass(frozen=True)
class History:
    """A padded batch of histories, oldest first, padding at the end.

    rows: int64 [B, T], -1 where padded; gaps: float [B, T], seconds since the event before (0 for the first),
    negative where the times are not known; weights: float [B, T], 1 neutral; profile: int64 [B, P], the users'
    attributes (see profile.py), -1 where padded, None where nobody has any.
    """

    rows: Tensor
    gaps: Tensor
    weights: Tensor
    profile: Tensor | None = None

    def to(self, device: torch.device | str) -> History:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if v is not None})

    def of(self, users: Tensor) -> History:
        """The histories of some users, int64, without the padding that they do not need."""
        longest = max(1, int((self.rows[users] >= 0).sum(1).max()))
        rows, gaps, weights = (x[users, :longest] for x in (self.rows, self.gaps, self.weights))
        return History(rows, gaps, weights, None if self.profile is None else self.profile[users])


@dataclass(frozen=True)
class Request:
    """What steers the decoder, per user and request position.

    scenario: int64 [B, Q]; trigger: int64 rows [B, Q], -1 for none; instruction: float [B, Q, text_dim];
    instructed: bool [B, Q], False where the learned default stands in; newest: int64 rows [B, Q] of the history's
    newest event, -1 for an empty history.
    """

    scenario: Tensor
    trigger: Tensor
    instruction: Tensor
    instructed: Tensor
    newest: Tensor

    def to(self, device: torch.device | str) -> Request:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items()})

    def of(self, users: Tensor) -> Request:
        return replace(self, **{k: v[users] for k, v in vars(self).items()})


def distances(history: History) -> Tensor:
    """How many events before the newest one each position lies, int64 [B, 1, T]; negative where padded."""
    lengths = (history.rows >= 0).sum(1)
    steps = torch.arange(history.rows.shape[1], device=history.rows.device)
    return (lengths[:, None] - 1 - steps)[:, None]


@dataclass
class SearchState:
    """Everything a search keeps for B users: per layer keys and values, the cross-attention bias, and the
    decoder's output for the first code [B, d]."""

    layers: list[LayerState]
    bias: Tensor
    hidden: Tensor


class GeneratorModel(PreTrainedModel):
    """The encoder-decoder over a catalogue of `config.items` items. Call `set_catalog` before use."""

    config_class = GeneratorConfig
    base_model_prefix = "generator"
    item_text: Tensor
    item_codes: Tensor
    leaf_items: Tensor
    path: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        d, k = config.d_model, config.codes
        self.item_in, self.item_out = nn.Embedding(config.items, d), nn.Embedding(config.items, d)
        self.code_in = nn.ModuleList(nn.Embedding(k, d) for _ in range(config.levels))
        self.code_out = nn.ModuleList(nn.Embedding(k, d) for _ in range(config.levels))
        self.text_in = nn.Linear(config.text_dim, d, bias=False)
        self.text_out = nn.ModuleList(nn.Linear(config.text_dim, d, bias=False) for _ in range(config.levels))
        self.gap = nn.Embedding(GAP_BUCKETS, d)
        self.weight = nn.Linear(1, d, bias=False)
        self.start = nn.Parameter(torch.empty(d))
        self.newest = nn.Linear(d, d, bias=False)
        self.scenario = nn.Embedding(len(config.scenarios), d)
        self.no_trigger = nn.Parameter(torch.empty(d))
        self.trigger = nn.Linear(d, d, bias=False)
        self.no_instruction = nn.Parameter(torch.empty(d))
        self.adapter = nn.Sequential(nn.Linear(config.text_dim, d), nn.GELU(), nn.Linear(d, d))
        self.slot = nn.Parameter(torch.empty(PREFIX + config.levels - 1, d))
        self.empty = nn.Parameter(torch.empty(d))
        if config.profiles:
            self.profile = nn.Embedding(BUCKETS, d)
        self.encoder_bias = nn.Embedding(config.max_history + 1, config.heads)
        self.cross_bias = nn.Embedding(config.max_history + 1, config.heads)
        sizes = (d, config.heads, config.d_ff, config.dropout)
        self.encoder_layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(config.decoder_layers))
        if config.retrieved:
            self.retrieval = InstructionRetrieval(d, config.retrieval_width)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.post_init()
        self.trie: Trie | None = None
        self._frozen: dict[str, Any] = {}

    def train(self, mode: bool = True) -> GeneratorModel:
        """As in torch; also forgets what searches keep (see `_kept`), since the weights may have changed."""
        self._frozen.clear()
        return super().train(mode)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if module is self:
            for parameter in (self.start, self.no_trigger, self.no_instruction, self.slot, self.empty):
                nn.init.normal_(parameter, std=0.02)
        if module is getattr(self, "item_out", None) or module in (self.encoder_bias, self.cross_bias):
            nn.init.zeros_(module.weight)

    @property
    def encoder_stack(self) -> list[EncoderLayer]:
        return [layer for layer in self.encoder_layers if isinstance(layer, EncoderLayer)]

    @property
    def decoder_stack(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder_layers if isinstance(layer, DecoderLayer)]

    # -- the catalogue ------------------------------------------------------------------------------

    def set_catalog(self, trie: Trie, text: Tensor) -> GeneratorModel:
        """The tree of legal IDs and the items' text embeddings, float [N, text_dim]. N may exceed
        `config.items`: further items are new, and have no embedding of their own."""
        if trie.items != len(text):
            raise ValueError(f"the trie has {trie.items} items, the text embeddings {len(text)}")
        if trie.levels != self.config.levels:
            raise ValueError(f"the trie has {trie.levels} levels, the model {self.config.levels}")
        self.trie = trie
        self._frozen.clear()
        text = text.to(self.device, torch.float32)
        codes = torch.stack([c[trie.path[:, i + 1]] for i, c in enumerate(trie.codes)], 1)
        constants = {"item_text": text, "item_codes": codes.to(self.device)}
        for level in range(trie.levels):
            pooled = trie.pooled(level + 1, text.cpu())
            constants[f"node_text_{level}"] = F.normalize(pooled, dim=1).to(self.device)
            constants[f"node_code_{level}"] = trie.codes[level].to(self.device)
            constants[f"first_{level}"] = trie.child_start[level].to(self.device)
            constants[f"count_{level}"] = trie.child_count[level].to(self.device)
            constants[f"leaf_start_{level + 1}"] = trie.leaf_start[level + 1].to(self.device)
        constants["leaf_items"] = trie.leaf_items.to(self.device)
        constants["path"] = trie.path.to(self.device)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        return self

    def _own(self, table: nn.Embedding, rows: Tensor) -> Tensor:
        """An item's own embedding; zero for rows that the model was not trained with."""
        known = rows < self.config.items
        return table(rows.clamp(max=self.config.items - 1)) * known.unsqueeze(-1)

    def _kept(self, name: str, make: Callable[[], T]) -> T:
        """What depends on weights and catalogue alone: in eval mode without gradients computed once and kept. After
        changing weights by hand call `eval()` again."""
        if self.training or torch.is_grad_enabled():
            return make()
        if name not in self._frozen:
            self._frozen[name] = make()
        return self._frozen[name]

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Input vectors of items: rows int64 [...] -> [..., d]."""
        if self.training or torch.is_grad_enabled():
            return self._item_vectors(rows)
        every = torch.arange(len(self.item_text), device=rows.device)
        return F.embedding(rows, self._kept("items", lambda: self._item_vectors(every)))

    def _item_vectors(self, rows: Tensor) -> Tensor:
        return self.code_vectors(rows) + self.text_in(self.item_text[rows])

    def code_vectors(self, rows: Tensor) -> Tensor:
        """The part of an item's input vector that is learned from events: its own and its codes' embeddings."""
        out = self._own(self.item_in, rows)
        for level, table in enumerate(self.code_in):
            out = out + table(self.item_codes[rows, level])
        return out

    def node_vectors(self, level: int) -> Tensor:
        """Output vectors of all nodes of level + 1: [nodes, d]."""
        return self._kept(f"nodes_{level}", lambda: self._node_vectors(level))

    def _node_vectors(self, level: int) -> Tensor:
        out = self.code_out[level](getattr(self, f"node_code_{level}"))
        out = out + self.text_out[level](getattr(self, f"node_text_{level}"))
        if level == self.config.levels - 1:
            out = out + self._own(self.item_out, self.leaf_items)
        return out

    # -- encoder ------------------------------------------------------------------------------------

    def encode(self, history: History) -> Tensor:
        """[B, T, d]; position t has seen events 0..t only. Drop input beforehand beyond max_history events."""
        rows = history.rows.clamp(min=0)
        x = self.item_vectors(rows)
        bucket = (torch.log2(history.gaps.clamp(min=0) / DAY + 1) * 1.4).long().clamp(max=UNKNOWN_GAP - 1)
        x = x + self.gap(bucket.masked_fill(history.gaps < 0, UNKNOWN_GAP))
        x = x + self.weight((history.weights - 1).unsqueeze(-1))
        steps = torch.arange(rows.shape[1], device=rows.device)
        distance = steps[:, None] - steps[None]
        if self.config.retrieved:  # each event reads as many as a request sees, however long the history is
            distance = distance.masked_fill(distance >= self.config.recent + self.config.retrieved, -1)
        bias = self._distance_bias(self.encoder_bias, distance)[None]
        x = self.encoder_stack[0].drop(x)
        for layer in self.encoder_stack:
            x = layer(x, bias)
        return self.encoder_norm(x)

    def _distance_bias(self, table: nn.Embedding, distance: Tensor) -> Tensor:
        """Bias per head [..., H, Q, T] for distances [..., Q, T] in events; negative ones are masked."""
        bias = table(distance.clamp(0, table.num_embeddings - 1)).movedim(-1, -3)
        return bias.masked_fill(distance.unsqueeze(-3) < 0, MASKED)

    # -- decoder ------------------------------------------------------------------------------------

    def scenario_tokens(self, request: Request) -> Tensor:
        """I_s, the scenario with its trigger item in one vector: [B, Q, d]."""
        trigger = self.trigger(self.item_vectors(request.trigger.clamp(min=0)))
        return self.scenario(request.scenario) + torch.where(
            (request.trigger >= 0).unsqueeze(-1), trigger, self.no_trigger
        )

    def instruction_tokens(self, request: Request) -> Tensor:
        """I_r, the adapted text embedding, or the learned default: [B, Q, d]."""
        given = self.adapter(request.instruction.to(self.dtype))
        return torch.where(request.instructed.unsqueeze(-1), given, self.no_instruction)

    def prefix_tokens(self, request: Request) -> Tensor:
        """[BOS, I_s, I_r] as vectors: [B, Q, 3, d]."""
        newest = self.newest(self.item_vectors(request.newest.clamp(min=0))) * (request.newest >= 0).unsqueeze(-1)
        scenario, given = self.scenario_tokens(request), self.instruction_tokens(request)
        return torch.stack([self.start + newest, scenario, given], 2) + self.slot[:PREFIX]

    # -- instruction-guided retrieval ---------------------------------------------------------------

    def queries(self, request: Request) -> Tensor:
        """q of every request, unit vectors [B, Q, retrieval_width]."""
        return self.retrieval.queries(self.scenario_tokens(request), self.instruction_tokens(request))

    def retrieval_items(self, rows: Tensor) -> Tensor:
        """t (or, without gradients, h) of items, unit vectors [..., retrieval_width]."""
        return self.retrieval.items(self.code_vectors(rows), self.adapter(self.item_text[rows]))

    def visible(self, history: History, request: Request, distance: Tensor) -> Tensor:
        """The distances with -1 at every position that a request does not see: [B, Q, T] (see igr.py).

        distance: int64 [B or 1, Q, T], events before the request's newest one, negative where it must not be seen.
        """
        if not self.config.retrieved:
            return distance
        with torch.no_grad():
            similarity = self.queries(request) @ self.retrieval_items(history.rows.clamp(min=0)).transpose(1, 2)
            distance = distance.expand_as(similarity).masked_fill((history.rows < 0)[:, None], -1)
            asked = request.instructed | (request.trigger >= 0)
            kept = keep(similarity, distance, asked, self.config.recent, self.config.retrieved)
        return distance.masked_fill(~kept, -1)

    def code_tokens(self, level: int, codes: Tensor) -> Tensor:
        """Vectors of chosen codes of a level, codes int64 [...] -> [..., d]."""
        return self.code_in[level](codes) + self.slot[PREFIX + level]

    def decode(self, history: History, request: Request, targets: Tensor, distance: Tensor) -> Tensor:
        """Teacher-forced outputs that predict each code of the targets: [B, Q, levels, d].

        targets: int64 rows [B, Q]; distance: int64 [B or 1, Q, T], how many events before the request each event
        of the history lies, negative where it must not be seen.
        """
        tokens = self.prefix_tokens(request)
        codes = [
            self.code_tokens(level, self.item_codes[targets, level]).unsqueeze(2)
            for level in range(self.config.levels - 1)
        ]
        x = self.decoder_stack[0].drop(torch.cat([tokens, *codes], 2))
        size = x.shape[2]
        causal = torch.full((size, size), MASKED, device=x.device, dtype=x.dtype).triu(1)
        memory, distance = self._with_profile(history, self.encode(history), distance)
        bias = self._distance_bias(self.cross_bias, distance)
        for i, layer in enumerate(self.decoder_stack):
            last = size if i < self.config.decoder_layers - 1 else self.config.levels
            x = layer(x, causal, layer.cross_attention.keys_values(memory), bias, last)
        return self.decoder_norm(x)

    def _with_profile(self, history: History, memory: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """One more memory position, at the head, that every request sees: the user's profile on a learned vector, so
        that an empty history of somebody unknown attends to something."""
        head = self.empty.expand(memory.shape[0], 1, -1)
        if self.config.profiles and history.profile is not None:
            known = (history.profile >= 0).unsqueeze(-1)
            given = self.profile(history.profile.clamp(min=0)) * known
            head = head + given.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        far = torch.full_like(distance[..., :1], self.config.max_history)
        return torch.cat([head, memory], 1), torch.cat([far, distance], -1)

    def child_scores(self, level: int, hidden: Tensor, nodes: Tensor) -> Tensor:
        """Log-probabilities of each node's children, normalised over the legal ones: [R, most children].

        hidden: [R, d]; nodes: int64 [R], of `level`. Padding holds MASKED.
        """
        first, count = getattr(self, f"first_{level}"), getattr(self, f"count_{level}")
        return F.log_softmax(child_logits(self.node_vectors(level), first, count, hidden, nodes).float(), -1)

    def log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of every code of the targets: hidden [P, levels, d], targets rows [P] -> [P, levels]."""
        out = []
        for level in range(self.config.levels):
            above, node = self.path[targets, level], self.path[targets, level + 1]
            logits = self.child_scores(level, hidden[:, level], above)
            slot = node - getattr(self, f"first_{level}")[above]
            out.append(logits.gather(1, slot[:, None])[:, 0])
        return torch.stack(out, 1)

    # -- search -------------------------------------------------------------------------------------

    def begin(self, history: History, request: Request) -> SearchState:
        """Encode B users once and run the prefix: request has Q = 1."""
        memory = self.encode(history)
        distance = self.visible(history, request, distances(history))
        if self.config.retrieved:  # only what is seen stays: the beams attend to recent + retrieved events
            seen = distance[:, 0] >= 0
            size = max(1, int(seen.sum(1).max()))
            at = (~seen).long().argsort(dim=1, stable=True)[:, :size]
            memory = memory.gather(1, at.unsqueeze(-1).expand(-1, -1, memory.shape[-1]))
            distance = distance.gather(2, at[:, None])
        memory, distance = self._with_profile(history, memory, distance)
        bias = self._distance_bias(self.cross_bias, distance)
        bias = F.pad(bias, (0, -bias.shape[-1] % LANES), value=MASKED)  # once, for all that attend to the history
        x = self.prefix_tokens(request)[:, 0]
        causal = torch.full((PREFIX, PREFIX), MASKED, device=x.device, dtype=x.dtype).triu(1)
        states = []
        for i, layer in enumerate(self.decoder_stack):
            y = layer.self_norm(x)
            prefix = layer.self_attention.keys_values(y)
            cross = layer.cross_attention.keys_values(memory)
            k, v = (t[:, :, :PREFIX] for t in prefix)
            states.append(LayerState(cross, (k, v)))
            last = PREFIX if i < self.config.decoder_layers - 1 else 1  # only the last token's output is wanted
            x, y = x[:, -last:], y[:, -last:]
            x = x + layer.self_attention(y, *prefix, causal[-last:])
            x = x + layer.cross_attention(layer.cross_norm(x), *cross, bias)
            x = x + layer.feed_forward(x)
        return SearchState(states, bias, self.decoder_norm(x[:, -1]))

    def advance(self, state: SearchState, level: int, codes: Tensor, grid: Grid, past: Tensor) -> Tensor:
        """Feed codes of `level` to R beams: codes int64 [R]; past: int64 [R], the row that each beam had in the step
        before. Returns the outputs for the next level, [R, d]."""
        tables = self._kept(f"code_{level}", lambda: self._code_inputs(level))
        x, q, kv = (F.embedding(codes, table) for table in tables)
        for i, (layer, layer_state) in enumerate(zip(self.decoder_stack, state.layers, strict=True)):
            if i:
                q, kv = layer.queries_keys_values(x)
            layer_state.codes = [codes.index_select(0, past) for codes in layer_state.codes]
            x = layer.step(x, q, kv, layer_state, grid, state.bias)
        return self.decoder_norm(x)

    def _code_inputs(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every code of a level as a token, with the first decoder layer's queries, keys and values of it."""
        x = self.code_tokens(level, torch.arange(self.config.codes, device=self.device))
        return x, *self.decoder_stack[0].queries_keys_values(x)
