"""Plain transformers, the last resort: it runs wherever PyTorch does."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from genrec.errors import GenrecError
from serving.llm.base import Chat, chat_tokens, generate_fitting, repetition_penalty
from serving.models import find_model, quiet_transformers


class Transformers:
    """Plain transformers: batches padded on the left, on the GPU where there is one.

    With a schema the reply is held to it where xgrammar is installed (vllm brings it); else the model writes freely
    and the caller's parser decides. batch: chats generated together."""

    def __init__(self, model: str | None = None, dtype: str = "float32", batch: int = 16) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path, self.name = find_model(model)
        self._penalty = repetition_penalty(model)
        self.batch = batch
        self.prompt_tokens = self.output_tokens = self.failures = 0
        try:
            with quiet_transformers():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
                self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        except (OSError, ValueError) as error:
            raise GenrecError(f"cannot load the model {path}: {str(error).splitlines()[0][:300]}") from error
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def generate(self, chats: list[Chat], schema: dict[str, Any] | None = None, max_tokens: int = 160) -> list[str]:
        """See Backend."""
        if not chats:
            return []
        tokens = [len(ids) + max_tokens for ids in chat_tokens(self._tokenizer, chats)]
        limit = self._model.config.max_position_embeddings
        return generate_fitting(
            chats, tokens, limit, self.name, lambda fitting: self._batches(fitting, schema, max_tokens)
        )

    def _batches(self, chats: list[Chat], schema: dict[str, Any] | None, max_tokens: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(chats), self.batch):
            texts += self._generate(chats[start : start + self.batch], schema, max_tokens)
        return texts

    def _generate(self, chats: list[Chat], schema: dict[str, Any] | None, max_tokens: int) -> list[str]:
        import torch

        inputs = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        with torch.inference_mode():
            ids = self._model.generate(
                **inputs,
                do_sample=False,
                repetition_penalty=self._penalty,
                max_new_tokens=max_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                logits_processor=self._grammar(schema),
            )[:, inputs["input_ids"].shape[1] :]
        self.prompt_tokens += int(inputs["attention_mask"].sum())
        self.output_tokens += int((ids != self._tokenizer.pad_token_id).sum())
        return list(self._tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _grammar(self, schema: dict[str, Any] | None) -> list[Any]:
        """A fresh logits processor that allows only what the schema allows; none without schema or xgrammar."""
        if schema is None or importlib.util.find_spec("xgrammar") is None:
            return []
        import xgrammar

        size = self._model.config.vocab_size
        tokens = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=size)
        grammar = xgrammar.GrammarCompiler(tokens).compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(",", ":")
        )
        return [xgrammar.contrib.hf.LogitsProcessor(grammar)]

    def close(self) -> None:
        """Frees the model's memory."""
        self._model = None
