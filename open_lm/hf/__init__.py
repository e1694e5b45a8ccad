"""OpenLM's published models in transformers: `from open_lm.hf import *`, then transformers' Auto classes load them."""

from typing import Any

__all__ = ["OpenLMConfig", "OpenLMForCausalLM", "OpenLMTokenizerFast"]


def __getattr__(name: str) -> Any:
    """One of the classes; the first use imports transformers and registers them all."""
    if name not in __all__:
        raise AttributeError(f"module 'open_lm.hf' has no attribute {name!r}")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from open_lm.hf.configuration_openlm import OpenLMConfig
    from open_lm.hf.modeling_openlm import OpenLMForCausalLM
    from open_lm.hf.tokenization_openlm import OpenLMTokenizerFast

    AutoConfig.register(OpenLMConfig.model_type, OpenLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM, exist_ok=True)
    AutoTokenizer.register(OpenLMConfig, fast_tokenizer_class=OpenLMTokenizerFast, exist_ok=True)
    for made in (OpenLMConfig, OpenLMForCausalLM, OpenLMTokenizerFast):
        globals()[made.__name__] = made
    return globals()[name]
