"""Where a model runs."""

import base64

from ...core.images import STORE
from ...core.types import Image


def data_url(image: Image) -> str:
    """A picture, as it is sent to servers. Raises: StoreError: its bytes are nowhere."""
    return "data:image/png;base64," + base64.b64encode(STORE.read(image)).decode()
