"""Evaluates an exported model on shards: scores, tables and pictures."""
