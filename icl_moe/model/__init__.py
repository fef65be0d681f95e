"""The sparse decoder."""
