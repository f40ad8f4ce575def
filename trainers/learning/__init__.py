"""Learning: batches to updates."""
