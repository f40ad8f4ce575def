"""Seeds by hashing: the same parts always give the same seed, different parts unrelated ones."""

import hashlib


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any mix of numbers and names."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
