"""EleutherAI's lm-evaluation-harness, with our models as its models."""
