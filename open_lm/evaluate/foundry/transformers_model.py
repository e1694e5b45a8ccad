"""A transformers model around one of ours for Composer, sharing its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from open_lm.data.tokenizer import Tokenizer


class WrappedConfig(PretrainedConfig):
    """The configuration that transformers and Composer need."""

    model_type = "open_lm_wrapped"


class WrappedModel(PreTrainedModel, GenerationMixin):
    """`model` behind transformers' interface. Generation runs without a cache: simple, and a second opinion on ours."""

    config_class = WrappedConfig
    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, config: WrappedConfig):
        super().__init__(config)
        self.inner = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any
    ) -> CausalLMOutputWithPast:
        """The logits of every position; padding on the right needs no mask, as no position sees what follows it."""
        if attention_mask is not None and bool(attention_mask[:, 0].bool().all()):
            attention_mask = None
        logits_BTV, _, _ = self.inner(input_ids, attention_mask_BT=attention_mask)
        return CausalLMOutputWithPast(logits=logits_BTV)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Any = None, **ignored: Any
    ) -> dict:
        """Every step sees the whole text."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> Any:
        inner: Any = self.inner
        return inner.tok_embeddings if hasattr(inner, "tok_embeddings") else inner.model.get_input_embeddings()


def wrapped(model: nn.Module) -> WrappedModel:
    """`model` as transformers sees it."""
    ours: Any = model.config
    config = WrappedConfig(  # type: ignore[call-arg]
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_dim,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=getattr(ours, "n_heads", 1),
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return WrappedModel(model, config).eval()


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers' class."""
    import tokenizers

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_json()),
        eos_token=tokenizer.token_of(tokenizer.eot_id),
        pad_token=tokenizer.token_of(tokenizer.pad_id),
    )
