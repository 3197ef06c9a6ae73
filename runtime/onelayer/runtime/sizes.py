"""Converts sizes as people write them (24GiB, 500MB) to bytes, and back."""

import re

_BYTES_PER_UNIT = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES_PER_UNIT |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Parse a size like 24GiB, 500MB or 1000 into bytes; raises `ValueError` with the remedy."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?", text.strip(), re.IGNORECASE)
    unit = (match[2] or "B").upper() if match else ""
    if match is None or unit not in _BYTES_PER_UNIT:
        raise ValueError(f"{text!r} is not a size; write 24GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _BYTES_PER_UNIT[unit])


def size(size_bytes: int) -> str:
    """Format bytes in the unit that leaves one to four digits before the point."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"
