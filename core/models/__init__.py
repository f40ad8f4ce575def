"""Models: opened, their tokens, what they stand on."""
