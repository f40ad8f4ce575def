"""Seeds by hashing: the same parts always give the same seed, different parts unrelated ones."""

import hashlib

SEPARATOR = "\x1f"


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any mix of numbers and names."""
    # The separator is doubled inside names, so that no name can pass for two parts.
    text = SEPARATOR.join(
        f"{type(part).__name__}:{str(part).replace(SEPARATOR, SEPARATOR * 2)}" for part in parts
    )
    hashed = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(hashed.digest()) >> 1
