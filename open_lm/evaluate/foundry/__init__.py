"""LLM Foundry's own evaluators, run beside current torch."""
