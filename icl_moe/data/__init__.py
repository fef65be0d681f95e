"""From shards to batches: random access, the order of samples, and the loader."""
