"""How good a model is by EleutherAI's lm-evaluation-harness: our models as its models."""
