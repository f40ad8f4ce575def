"""Where thoughts end in what a model says: at the last ``</think>``."""

BEGUN, ENDED = "<think>", "</think>"


def spoken(text: str) -> str:
    """What is no thought."""
    return text.rpartition(ENDED)[2]


def thinks_still(text: str) -> bool:
    """Whether it is in the middle of a thought."""
    return BEGUN in text and ENDED not in text
