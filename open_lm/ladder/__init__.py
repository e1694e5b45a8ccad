"""Ladders of models: plan sizes, train them, and fit the law that predicts the next one."""
