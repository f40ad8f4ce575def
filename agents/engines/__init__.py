"""Where a model runs."""

import base64


def data_url(image: bytes) -> str:
    """A PNG, as it is sent to servers."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
