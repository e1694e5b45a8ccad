"""Numbers formatted for people."""

_COUNT_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def count(number: float) -> str:
    """`1234567` as `1.23M`; below a thousand the number itself."""
    for size, unit in _COUNT_UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def size(n_bytes: float) -> str:
    """`1536` as `1.5 KiB`."""
    for scale, unit in _BYTE_UNITS:
        if abs(n_bytes) >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """`3725` as `1h02m05s`; below a minute as `5.2s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m{rest:02d}s" if hours else f"{minutes}m{rest:02d}s"
