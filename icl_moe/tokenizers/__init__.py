"""Tokenizers of images, masks and text."""

IMAGE_TOKENIZERS = ("image_tokenizer", "mask_tokenizer", "features_tokenizer")
"""The folders of the tokenizers of images that a model, or a folder of shards, may have."""
