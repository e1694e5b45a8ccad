"""How good a model is on in-context learning tasks by LLM Foundry's own library, run beside current torch."""
