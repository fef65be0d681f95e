"""Training on the DeepSpeed engine."""
