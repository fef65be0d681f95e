"""From an exported model to masks and captions."""
