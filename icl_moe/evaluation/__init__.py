"""From an exported model and shards to tables and pictures."""
