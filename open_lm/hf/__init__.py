"""OpenLM's published models in transformers: `from open_lm.hf import *`, then transformers' Auto classes load them."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from open_lm.hf.configuration_openlm import OpenLMConfig
from open_lm.hf.modeling_openlm import OpenLMForCausalLM
from open_lm.hf.tokenization_openlm import OpenLMTokenizerFast

__all__ = ["OpenLMConfig", "OpenLMForCausalLM", "OpenLMTokenizerFast"]

AutoConfig.register(OpenLMConfig.model_type, OpenLMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM, exist_ok=True)
AutoTokenizer.register(OpenLMConfig, fast_tokenizer_class=OpenLMTokenizerFast, exist_ok=True)
