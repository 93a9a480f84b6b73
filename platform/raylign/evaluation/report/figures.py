"""Numbers as people read them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"


def show_model(name: str) -> str:
    """A model's name as a title: the run's own three by what they are, others as given."""
    return {"base": "Base", "sft": "SFT", "rl": "RL"}.get(name, name)


def show_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `9 min 48 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show_percent(share: float, digits: int = 1) -> str:
    """0.915 as `91.5%`; a share too small to show as `<0.1%`."""
    if 0 < share < 0.5 * 10 ** -(digits + 2):
        return f"<{10**-digits:.{digits}f}%"
    return f"{100 * share:.{digits}f}%"


def show_points(change: float) -> str:
    """0.295 as `+29.5`: percentage points with their sign."""
    return f"{100 * change:+.1f}".replace("-", MINUS)


def show_count(count: float) -> str:
    """`950`, `12,400`, `3.4 M`, `1.2 B`."""
    for limit, size, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M")):
        if abs(count) >= limit:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def show_number(value: float, digits: int = 3) -> str:
    """Three significant digits; powers of ten where those would hide in zeros."""
    if math.isnan(value):
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    if abs(value) >= 10**digits:
        return f"{value:,.0f}".replace("-", MINUS)
    text = f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def show_unit(value: float, unit: str) -> str:
    """A value in a chart's unit."""
    if unit == "percent":
        return show_percent(value)
    if unit == "seconds":
        return f"{show_number(value)} s"
    return show_number(value)
