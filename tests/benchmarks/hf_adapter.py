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
        history = History(input_ids, torch.zeros(input_ids.shape), torch.ones(input_ids.shape))
        memory = self.model[0].encode(history)
        lengths = (input_ids >= 0).sum(1)
        distance = (lengths[:, None] - 1 - torch.arange(input_ids.shape[1]))[:, None]
        memory, distance = self.model[0]._with_sink(memory, distance)
        bias = self.model[0]._distance_bias(self.model[0].cross_bias, distance)
        return BaseModelOutput(last_hidden_state=memory, attentions=bias)


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
        self.code_of = [c + FIRST_CODE + level * config.codes for level, c in enumerate(trie.codes)]
        self.tokens_below = [
            {int(self.code_of[level][n]): int(n) for n in row[row >= 0]}
            for level in range(trie.levels)
            for row in trie.children[level]
        ]
        self.child_table = trie.children
        sizes = [trie.size(level) for level in range(trie.levels)]
        self.first = [sum(sizes[:level]) for level in range(trie.levels)]

    def get_encoder(self, *_: object, **__: object) -> nn.Module:
        return self.encoder

    def node(self, tokens: list[int]) -> int:
        """The trie node of the codes in a decoder sequence."""
        node = 0
        for level, token in enumerate(tokens):
            node = self.tokens_below[self.first[level] + node][token]
        return node

    def allowed_tokens(self, _: int, ids: Tensor) -> list[int]:
        """For prefix_allowed_tokens_fn."""
        codes = ids[PREFIX:].tolist()
        return list(self.tokens_below[self.first[len(codes)] + self.node(codes)])

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
            keys, values = past_key_values.self_attention_cache.update(*layer.self_attention.keys_values(y), i)
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
        nodes = torch.tensor([self.node(row) for row in ids[:, PREFIX:].tolist()])
        children = self.child_table[level][nodes]
        vectors = model.node_vectors(level)[children.clamp(min=0)]
        scores = torch.einsum("bd,bcd->bc", hidden, vectors).masked_fill(children < 0, MASKED)
        logits = torch.full((batch, self.config.vocab_size), MASKED)
        tokens = self.code_of[level][children.clamp(min=0)].masked_fill(children < 0, 0)
        logits.scatter_(1, tokens, scores)
        return Seq2SeqLMOutput(logits=logits[:, None], past_key_values=past_key_values)

    @torch.no_grad()
    def search(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Their beam search: items [B, W] and log-probabilities, for histories rows [B, T]."""
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
            renormalize_logits=True,
            prefix_allowed_tokens_fn=self.allowed_tokens,
            pad_token_id=0,
            decoder_start_token_id=1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        nodes = torch.tensor([self.node(s) for s in found.sequences[:, PREFIX:].tolist()])
        items = self.model.leaf_items[nodes].view(len(rows), width)
        return items, F.threshold(found.sequences_scores.view(len(rows), width), -1e8, -1e8)
