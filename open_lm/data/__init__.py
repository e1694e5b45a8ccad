"""From text to batches: shards, the plan of their order, and the loader."""
