"""Small images and recordings: a seed in, pixels, samples and files of many kinds out."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 8, height: int = 6, seed: int = 0) -> Image.Image:
    """Draw random RGB pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of a file of one format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(image: Image.Image) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"


def recording(path: Path, seconds: float = 0.1, rate_hz: int = 16000, channels: int = 1) -> Path:
    """Write a sine of 440 Hz, the same in every channel."""
    import soundfile  # type: ignore[import-untyped]

    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate_hz)) / rate_hz)
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), rate_hz)
    return path


def bomb() -> bytes:
    """Return a PNG of 67 bytes that claims 10 000 x 10 000 pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
