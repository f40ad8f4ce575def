"""Images that strangers send: whole PNG files of a bearable size, found out before any decoder."""

import base64
import binascii
import struct
import zlib

from ...core.images import SIGNATURE, picture
from ...core.types import Image
from .limits import Limits, Refusal

DATA_URL = "data:image/png;base64,"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By a PNG's colour type."""
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PIECE = 1 << 16


def checked_images(given: list[str], limits: Limits, param: str) -> tuple[Image, ...]:
    """The PNG files of base64 texts, which go as long as whoever holds them.

    Raises:
        Refusal: too many, too large, or no such file.
    """
    if len(given) > limits.images:
        message = f"wanted at most {limits.images} images, got {len(given)}"
        raise Refusal(400, message, "too_many_images", param)
    return tuple(_checked(text, limits, f"{param}[{k}]") for k, text in enumerate(given))


def _checked(text: str, limits: Limits, param: str) -> Image:
    most = int(limits.image_mb * 1e6)
    if len(text) * 3 // 4 > most + 3:
        message = f"{param} is larger than {limits.image_mb:g} MB"
        raise Refusal(413, message, "image_too_large", param)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{param} is not base64", "bad_image", param) from None
    try:
        pixels = _pixels(data)
        if pixels > limits.image_pixels:
            message = f"{param} has {pixels:,} pixels, more than {limits.image_pixels:,}"
            raise Refusal(413, message, "image_too_large", param)
        _whole(data)
    except (ValueError, struct.error, zlib.error) as error:
        message = f"{param} is no whole PNG: {error}"
        raise Refusal(400, message, "bad_image", param) from None
    return picture(data)


def _pixels(data: bytes) -> int:
    if not data.startswith(SIGNATURE) or data[12:16] != b"IHDR":
        raise ValueError("it does not begin as one")
    width, height, depth, colour, packing, filtering, interlaced = struct.unpack(
        ">IIBBBBB", data[16:29]
    )
    if not (width and height and depth in DEPTHS.get(colour, ()) and packing == filtering == 0):
        raise ValueError("its header makes no sense")
    if interlaced:
        raise ValueError("it is interlaced; save it without")
    return width * height


def _whole(data: bytes) -> None:
    """Every checksum is right, and it inflates to exactly the bytes its header announces."""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    wanted = height * (1 + (width * depth * CHANNELS[colour] + 7) // 8)
    inflater, got, at, name = zlib.decompressobj(), 0, len(SIGNATURE), b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        if checksum != zlib.crc32(name + body):
            raise ValueError(f"the checksum of {name.decode('latin-1')!r} is wrong")
        at += 12 + length
        while name == b"IDAT" and body and got <= wanted:
            # Piece by piece and thrown away: it need not fit in memory to be counted.
            got += len(inflater.decompress(body, PIECE))
            body = inflater.unconsumed_tail
    if at != len(data):
        raise ValueError("there is more behind its end")
    while got < wanted and (more := inflater.decompress(b"", PIECE)):
        got += len(more)
    if got != wanted or not inflater.eof:
        raise ValueError(f"its pixels take {wanted:,} bytes, it holds others")
