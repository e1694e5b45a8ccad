"""OpenLM's `llm_foundry_wrapper`: a model of transformers for Composer's Trainer, with LLM Foundry's metrics."""

from __future__ import annotations

from typing import Any

from open_lm.evaluate.foundry.imports import require_llm_foundry

__all__ = ["SimpleComposerOpenLMCausalLM"]

require_llm_foundry()

from composer.models.huggingface import HuggingFaceModel  # noqa: E402

from open_lm.evaluate.foundry.runner import all_metrics  # noqa: E402


class SimpleComposerOpenLMCausalLM(HuggingFaceModel):
    """`SimpleComposerOpenLMCausalLM(OpenLMforCausalLM(...), tokenizer)`: what `composer.Trainer` evaluates."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__(
            model=model, tokenizer=tokenizer, metrics=[], eval_metrics=all_metrics(), shift_labels=True,
            use_logits=True,
        )  # fmt: skip
