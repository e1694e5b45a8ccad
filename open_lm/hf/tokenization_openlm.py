"""The tokenizer of OpenLM's published models: GPT-NeoX's, from the tokenizer.json beside the weights."""

from transformers import GPTNeoXTokenizerFast  # type: ignore[attr-defined]


class OpenLMTokenizerFast(GPTNeoXTokenizerFast):
    """GPT-NeoX's tokenizer, under the name that OpenLM's folders may give it."""
