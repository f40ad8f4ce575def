# Nearly all of it is without types, and to read them took a third of the time of the check.
from typing import Any

def __getattr__(name: str) -> Any: ...  # pyright: ignore[reportIncompleteStub]
