"""Labelling a folder of images after a few examples: `icl-moe label`."""
