"""How good a model is on LLM Foundry's in-context learning tasks: our own engine, which agrees with theirs."""
