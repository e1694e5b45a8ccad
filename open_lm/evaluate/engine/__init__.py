"""The native scoring engine: encode, batch, score, and sum up LLM Foundry's task types."""
