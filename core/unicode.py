"""What is text. Imports nothing: the command asks before anything else is there."""


def no_unicode(text: str) -> str:
    """Where ``text`` is no Unicode; empty if it is."""
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        return f"{found} at character {error.start} is half of a surrogate pair"
    return ""
