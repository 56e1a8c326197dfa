"""The generator's weights behind transformers' own `generate`, for comparison: same probabilities, their search.

Tokens: 0 padding, 1 BOS, 2 scenario, 3 instruction, then the codes of each level. `forward` caches self-attention
keys per beam and cross-attention keys per sequence in an EncoderDecoderCache, as T5 does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from genrec.generator.config import GeneratorConfig
from genrec.generator.layers import MASKED
from genrec.generator.model import PREFIX, GeneratorModel, History, Request

FIRST_CODE = 4


class Encoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, model: GeneratorModel) -> None:
        super().__init__()
        self.model = [model]  # a list, so that its parameters are not registered twice

    def forward(self, input_ids: Tensor, **_: object) -> BaseModelOutput:
        history = History(input_ids, torch.full(input_ids.shape, -1.0), torch.ones(input_ids.shape))  # without times
        memory = self.model[0].encode(history)
        lengths = (input_ids >= 0).sum(1)
        distance = (lengths[:, None] - 1 - torch.arange(input_ids.shape[1]))[:, None]
        memory, distance = self.model[0]._with_profile(history, memory, distance)
        bias = self.model[0]._distance_bias(self.model[0].cross_bias, distance)
        newest = input_ids.gather(1, (lengths - 1).clamp(min=0)[:, None])
        return BaseModelOutput(last_hidden_state=memory, attentions=bias, hidden_states=newest)


class GenerateAdapter(PreTrainedModel, GenerationMixin):
    config_class = GeneratorConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, model: GeneratorModel) -> None:
        config = GeneratorConfig(**model.config.to_dict())
        config.is_encoder_decoder = True
        config.vocab_size = FIRST_CODE + config.levels * config.codes
        config.num_hidden_layers = config.decoder_layers
        super().__init__(config)
        self.model = model
        self.encoder = Encoder(model)
        trie = model.trie
        assert trie is not None
        self.token_of = [c + FIRST_CODE + level * config.codes for level, c in enumerate(trie.codes)]
        self.child_tokens = [t[c.clamp(min=0)] for t, c in zip(self.token_of, trie.children, strict=True)]
        # what prefix_allowed_tokens_fn looks up: the tokens below every prefix of tokens, and the node it leads to
        prefixes: list[tuple[int, ...]] = [()]
        self.tokens_below: dict[tuple[int, ...], list[int]] = {}
        self.node: dict[tuple[int, ...], int] = {(): 0}
        for tokens, parents, counts in zip(self.token_of, trie.parents, trie.child_count, strict=True):
            runs = tokens.split(counts.tolist())
            self.tokens_below |= {p: run.tolist() for p, run in zip(prefixes, runs, strict=True)}
            prefixes = [(*prefixes[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
            self.node |= {p: n for n, p in enumerate(prefixes)}

    def get_encoder(self, *_: object, **__: object) -> nn.Module:
        return self.encoder

    def nodes(self, ids: Tensor) -> Tensor:
        """The trie nodes of decoder sequences."""
        return torch.tensor([self.node[tuple(row)] for row in ids[:, PREFIX:].tolist()])

    def allowed_tokens(self, _: int, ids: Tensor) -> list[int]:
        """For prefix_allowed_tokens_fn."""
        return self.tokens_below[tuple(ids[PREFIX:].tolist())]

    def prepare_inputs_for_generation(self, decoder_input_ids: Tensor, past_key_values=None, encoder_outputs=None, **_):
        return {
            "decoder_input_ids": decoder_input_ids,
            "past_key_values": past_key_values,
            "encoder_outputs": encoder_outputs,
        }

    def forward(self, input_ids=None, decoder_input_ids=None, encoder_outputs=None, past_key_values=None, **_):
        model, ids = self.model, decoder_input_ids
        memory, bias = encoder_outputs.last_hidden_state, encoder_outputs.attentions
        if past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        done = past_key_values.self_attention_cache.get_seq_length()
        batch = len(ids)
        request = Request(
            torch.zeros(batch, 1, dtype=torch.long),
            torch.full((batch, 1), -1),
            torch.zeros(batch, 1, model.config.text_dim),
            torch.zeros(batch, 1, dtype=torch.bool),
            encoder_outputs.hidden_states,
        )
        parts = [model.prefix_tokens(request)[:, 0]] if done == 0 else []
        for position in range(max(done, PREFIX), ids.shape[1]):
            level = position - PREFIX
            code = ids[:, position] - FIRST_CODE - level * model.config.codes
            parts.append(model.code_tokens(level, code)[:, None])
        x = torch.cat(parts, 1)
        new = x.shape[1]
        causal = torch.full((new, done + new), MASKED).triu(1 + done)
        for i, layer in enumerate(model.decoder_layers):
            y = layer.self_norm(x)
            here = (t[:, :, :new] for t in layer.self_attention.keys_values(y))
            keys, values = past_key_values.self_attention_cache.update(*here, i)
            x = x + layer.self_attention(y, keys, values, causal)
            if past_key_values.is_updated.get(i):
                cross = past_key_values.cross_attention_cache.layers[i]
                keys, values = cross.keys, cross.values
            else:
                keys, values = past_key_values.cross_attention_cache.update(
                    *layer.cross_attention.keys_values(memory), i
                )
                past_key_values.is_updated[i] = True
            x = x + layer.cross_attention(layer.cross_norm(x), keys, values, bias)
            x = x + layer.feed_forward(x)
        hidden = model.decoder_norm(x[:, -1])
        level = ids.shape[1] - PREFIX
        nodes = self.nodes(ids)
        scores = model.child_scores(level, hidden, nodes)
        logits = torch.full((batch, self.config.vocab_size), MASKED)
        logits.scatter_(1, self.child_tokens[level][nodes].masked_fill(scores <= MASKED / 2, 0), scores)
        return Seq2SeqLMOutput(logits=logits[:, None], past_key_values=past_key_values)

    @torch.no_grad()
    def search(self, rows: Tensor, width: int, constrained: bool = True) -> tuple[Tensor, Tensor]:
        """Their beam search: items [B, W] and log-probabilities, for histories rows [B, T].

        constrained: legal tokens by transformers' own `prefix_allowed_tokens_fn`. Without it nothing but the logits of
        `forward`, which are low for illegal tokens, keeps the search legal: quicker, and part of it is our code.
        """
        start = torch.tensor([[1, 2, 3]]).expand(len(rows), -1)
        found = self.generate(
            input_ids=rows,
            decoder_input_ids=start,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=self.config.levels,
            min_new_tokens=self.config.levels,
            do_sample=False,
            length_penalty=0.0,
            renormalize_logits=constrained,
            prefix_allowed_tokens_fn=self.allowed_tokens if constrained else None,
            pad_token_id=0,
            decoder_start_token_id=1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        items = self.model.leaf_items[self.nodes(found.sequences)].view(len(rows), width)
        return items, F.threshold(found.sequences_scores.view(len(rows), width), -1e8, -1e8)
