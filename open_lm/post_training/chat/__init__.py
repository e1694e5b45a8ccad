"""Chat data: conversations, preference pairs and prompts become samples that say which tokens are trained on."""
