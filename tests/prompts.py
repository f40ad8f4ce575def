"""What models are asked in tests: prompts of one line, small pictures, and who reads those."""

import struct
import zlib
from typing import Any

from selfwright.core.images import picture
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import Image, Message, Part, Prompt

SEEING = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template of a model that reads pictures and is told of tools."""


def prompt_of(*parts: Part) -> Prompt:
    """One message of the user's."""
    return Prompt((Message("user", parts),))


def png(width: int = 3, height: int = 2, interlaced: int = 0, rows: bytes | None = None) -> bytes:
    """A whole RGB picture; ``rows`` is what is in it, if not what its header says."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    if rows is None:
        rows = b"".join(
            b"\0" + bytes((x * y) % 256 for x in range(3 * width)) for y in range(height)
        )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def grey(shade: int, width: int = 2, height: int = 1) -> Image:
    """A picture of one grey, 0 to 255, with its bytes."""
    row = b"\0" + bytes([shade]) * 3 * width
    return picture(png(width, height, rows=row * height))


def seeing(tokenizer: Any) -> ChatTokens:
    """``tokenizer``, which is of texts alone, made that of a model that reads pictures, too."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = SEEING
    return ChatTokens(tokenizer, placeholder=tokenizer.convert_tokens_to_ids("<image>"))
