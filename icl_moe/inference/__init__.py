"""Generates masks and captions with an exported model."""
