"""Post-training: chat data, fine-tuning, preferences, reward models, reinforcement learning and adapters."""
