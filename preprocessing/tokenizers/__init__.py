"""Image tokenizers: training and measuring them, offline."""
