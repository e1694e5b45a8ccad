"""Reading data: shards, the plan of their order, and the loader."""
