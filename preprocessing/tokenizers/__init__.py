"""Offline training and evaluation of image tokenizers."""
