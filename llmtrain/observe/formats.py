"""Numbers and texts as people read them; every line on a screen, warning and plot uses these."""

from __future__ import annotations

import math
import unicodedata


def count(value: int) -> str:
    """`1200` → `1,200`."""
    return f"{value:,}"


def compact(value: float) -> str:
    """Three digits and a unit: `412345` → `412k`, `1234567` → `1.23M`."""
    if not math.isfinite(value):
        return str(value)
    units = iter("kMGT")
    unit = ""
    while abs(value) >= 999.5 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    digits = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def loss(value: float) -> str:
    """A loss in nats: `2.13412` → `2.134`."""
    return f"{value:.3f}"


def rate(value: float) -> str:
    """A learning rate: `3e-4` → `3.0e-04`."""
    return f"{value:.1e}"


def norm(value: float) -> str:
    """A norm of any size: `0.5123` → `0.512`, `0.0000003` → `3e-07`."""
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share from 0 to 1, rounded down so that only what is complete says 100: `0.349` → `34 %`."""
    return f"{math.floor(100 * share + 1e-9)} %" if math.isfinite(share) else "? %"


def change(share: float) -> str:
    """By what share something changed, with a sign: `-0.3487` → `-34.9 %`, `-0.00996` → `-0.996 %`."""
    digits = 1 if abs(share) >= 0.01 else 3
    return f"{100 * share:+.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss`, with days before it where there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


def age(seconds: float) -> str:
    """How long ago, in its largest unit: `75` → `1 min`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def printable(text: str) -> str:
    """`text` without what would command a terminal: a model may well write escape sequences."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def visible(data: bytes) -> str:
    """The text of a token on one line: each space as `·`, what else cannot be seen as an escape (`\\n`, `\\xc3`)."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join("·" if char == " " else char if _is_seen(char) else _escape(char) for char in text)


def _is_seen(char: str) -> bool:
    return char.isprintable() and char not in "·\\" and not unicodedata.combining(char)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    # Python writes U+00B7 as it writes the byte B7.
    return f"\\u{code:04x}" if 0x80 <= code <= 0xFF else char.encode("unicode_escape").decode()
