"""What token sequences begin with alike."""

from collections.abc import Sequence

STEP = 16
"""What prompts have in common is read by itself in whole steps of this: else tasks that happen to
begin alike would have it read, and kept, at as many lengths."""
LEAST = 64
"""Less than this many ids are read by each."""


def common(sequences: Sequence[tuple[int, ...]] | Sequence[list[int]]) -> int:
    """How many ids, in whole steps, ``sequences`` begin with alike and each goes on from."""
    first, last = min(sequences), max(sequences)  # Of what is sorted, the extremes differ most.
    most = min(map(len, sequences)) - 1
    alike = next((k for k in range(most) if first[k] != last[k]), most)
    return alike // STEP * STEP if alike >= LEAST else 0
