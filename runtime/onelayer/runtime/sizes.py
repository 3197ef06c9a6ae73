"""Converts sizes as people write them (24GiB, 500MB) to bytes, and back."""

import re

# A bare number below this is a number of GiB whose unit was forgotten.
_BARE_FLOOR_BYTES = 1 << 20
_BYTES_PER_UNIT = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES_PER_UNIT |= {f"{prefix}{end}": 1 << 10 * power for power, prefix in enumerate("KMGT", 1) for end in ("", "IB")}


def parse_size(text: str) -> int:
    """Parse a size like 24GiB, 24G (the same), 500MB or 17179869184 into bytes; raises `ValueError` with the remedy."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|[kmgtb])?", text.strip(), re.IGNORECASE)
    unit = (match[2] or "B").upper() if match else ""
    if match is None or unit not in _BYTES_PER_UNIT:
        raise ValueError(f"{text!r} is not a size; write 24GiB, 24G, 500MB or a number of bytes")
    if match[2] is None and 0 < float(match[1]) < _BARE_FLOOR_BYTES:
        raise ValueError(f"{text!r} is a number of bytes; write {text.strip()}GiB, or {text.strip()}B if you mean it")
    return int(float(match[1]) * _BYTES_PER_UNIT[unit])


def broken_promise(peak_bytes: int, promised_bytes: int | None) -> str:
    """Say how far a peak exceeds what was promised; empty if it does not, or nothing was promised."""
    if promised_bytes is None or peak_bytes <= promised_bytes:
        return ""
    return f"MORE THAN PROMISED: {size(peak_bytes)} of {size(promised_bytes)}, {peak_bytes / promised_bytes:.1f} times"


def size(size_bytes: int) -> str:
    """Format bytes in the unit that leaves one to four digits before the point."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.2f} {unit}"
        amount /= 1024
    return f"{amount:.2f} TiB"
