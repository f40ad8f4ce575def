"""Names for episodes that have none."""

import hashlib
from collections.abc import Iterable

from ..files import canonical_json


def derived_id(
    task: str, seed: int, attempt: int, policy: str, actions: Iterable[str], place: int
) -> str:
    """32 hexadecimal digits, the same for the same episode at the same place of its file."""
    payload = canonical_json([task, seed, attempt, policy, list(actions), place])
    return hashlib.sha256(payload.encode("utf-8", "backslashreplace")).hexdigest()[:32]
