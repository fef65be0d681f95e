"""Tokenizers of images, masks and text."""
