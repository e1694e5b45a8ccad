"""Downstream tasks: suites, rows and prompts, as LLM Foundry defines them."""
