"""Seeds by hashing: the same parts always give the same seed, different parts unrelated ones."""

import hashlib
from collections.abc import Sequence

SEPARATOR = "\x1f"


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) from any mix of numbers and names."""
    return int.from_bytes(_hashed(parts, 8)) >> 1


def identify(*parts: int | str) -> str:
    """A name of 20 hexadecimal digits, the same for the same parts and for no others."""
    return _hashed(parts, 10).hex()


def _hashed(parts: Sequence[int | str], size: int) -> bytes:
    # The separator is doubled inside names, so that no name can pass for two parts.
    text = SEPARATOR.join(
        f"{type(part).__name__}:{str(part).replace(SEPARATOR, SEPARATOR * 2)}" for part in parts
    )
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest()
