"""Units: what a quantity is counted in, and the only place where text becomes bytes or bytes become text.

GB is 10^9 bytes and GiB is 2^30 bytes, here and everywhere. Rates are bytes per second inside; `100Mbit/s` is accepted
as input.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import NewType

from memwall.errors import InputError

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)
Watts = NewType("Watts", float)
BytesPerSecond = NewType("BytesPerSecond", float)
FlopPerSecond = NewType("FlopPerSecond", float)
"""Operations per second, a multiply and an add counted as two, whatever the number type."""

KB, MB, GB, TB, PB = (Bytes(1000**power) for power in range(1, 6))
KIB, MIB, GIB, TIB, PIB = (Bytes(1024**power) for power in range(1, 6))

_DECIMAL = {"B": 1, "kB": KB, "MB": MB, "GB": GB, "TB": TB, "PB": PB}
_BINARY = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB, "PiB": PIB}
_BITS = {"bit": 1, "kbit": KB, "Mbit": MB, "Gbit": GB, "Tbit": TB}
_MULTIPLES = {"k": KB, "M": MB, "G": GB, "T": TB, "P": PB}
_SECONDS = {"s": Fraction(1), "ms": Fraction(1, KB), "us": Fraction(1, MB), "ns": Fraction(1, GB)}
_SIZES = {name.lower(): scale for name, scale in (_DECIMAL | _BINARY).items()}
_BIT_RATES = {name.lower(): Fraction(scale, 8) for name, scale in _BITS.items()}

SIZE_FORMS = (
    "a number of bytes (4096), or a number with B, kB, MB, GB, TB (powers of 1000) "
    "or KiB, MiB, GiB, TiB (powers of 1024)"
)
RATE_FORMS = "a size per second (1GB/s, 500MiB/s) or bits per second (100Mbit/s, 10Gbit/s)"
_LARGEST = 2**63 - 1
_NUMBER = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(text: str) -> Bytes:
    """`200MB`, `1.5GiB`, `2 gb` or `4096` to bytes; a fraction of a byte is dropped, so that a limit is never exceeded.

    Raises InputError for forms with two readings: `1g` (GB or GiB?) and `1Gb` (gigabits?).
    """
    number, unit = _split(text, "size", SIZE_FORMS)
    return Bytes(_bounded(number * _size_scale(unit, text), text))


def format_bytes(num_bytes: int, *, exact: bool = False) -> str:
    """Bytes as text in decimal units: `1.23 GB`, or with `exact` every digit (`1.234567891 GB`), which `parse_bytes`
    undoes.
    """
    sign = "-" if num_bytes < 0 else ""
    size = abs(int(num_bytes))
    name, scale = next((item for item in reversed(_DECIMAL.items()) if size >= item[1]), ("B", 1))
    if scale == 1:
        return f"{sign}{size} {name}"
    if exact:
        return f"{sign}{_trimmed(Decimal(size) / Decimal(scale))} {name}"
    if size >= 999.5 * scale and scale < PB:  # would print as 1000 of the smaller unit
        larger = list(_DECIMAL.items())
        name, scale = larger[larger.index((name, scale)) + 1]
    value = size / scale
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:.{digits}f} {name}"


def parse_rate(text: str) -> BytesPerSecond:
    """`1GB/s`, `500MiB/s`, `100Mbit/s` or `10Gbps` to bytes per second."""
    body, slash, per = text.strip().partition("/")
    if not slash and body.endswith("bps"):  # 100Mbps: bits by universal habit; MBps has two readings and falls through
        body, slash, per = f"{body[:-3]}bit", "/", "s"
    if not slash or per.strip() not in ("s", "sec", "second"):
        raise InputError(f"{text[:60]!r} is not a rate: write {RATE_FORMS}")
    number, unit = _split(body, "rate", RATE_FORMS)
    scale = _BIT_RATES.get(unit.lower()) if unit else None
    if scale is None:
        if not unit:
            raise InputError(f"{text!r} is not a rate: the unit is missing; write {RATE_FORMS}")
        scale = Fraction(_size_scale(unit, text))
    return BytesPerSecond(float(_bounded_fraction(number * scale, text)))


def format_rate(bytes_per_s: float) -> str:
    """Bytes per second as text: `20.1 GB/s`."""
    return f"{format_bytes(round(bytes_per_s))}/s"


def parse_count(text: str) -> int:
    """A count of tokens or the like: `4096`, or `32k` and `1M` in powers of 1024, as context lengths are named."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([kKmM]?)", text.strip(), re.ASCII)
    if match is None:
        raise InputError(f"{text[:60]!r} is not a count: write a whole number such as 4096, or 32k (k = 1024)")
    return int(match[1]) * {"": 1, "k": KIB, "m": MIB}[match[2].lower()]


def format_flop_rate(flop_per_s: float) -> str:
    """Operations per second as text: `1.2 TFLOP/s`."""
    for name, scale in reversed((_MULTIPLES | {"E": 1000 * PB}).items()):
        if flop_per_s >= scale:
            return f"{flop_per_s / scale:.3g} {name}FLOP/s"
    return f"{flop_per_s:.3g} FLOP/s"


def parse_flop_rate(text: str) -> FlopPerSecond:
    """`312 TFLOP/s` or `24.5TOP/s` to operations per second."""
    number, unit = _split(text.replace("/s", ""), "rate of operations", "such as 312TFLOP/s or 24.5TOP/s")
    match = re.fullmatch(r"([kMGTP]?)(?:FLOP|OP)", unit)
    if match is None or not text.strip().endswith("/s"):
        raise InputError(f"{text[:60]!r} is not a rate of operations: write 312TFLOP/s or 24.5TOP/s")
    return FlopPerSecond(float(number * _MULTIPLES.get(match[1], Bytes(1))))


def parse_seconds(text: str) -> Seconds:
    """`110ns`, `45us`, `1.2ms` or `3s` to seconds."""
    number, unit = _split(text, "duration", "such as 110ns, 45us, 1.2ms or 3s")
    if unit not in _SECONDS:
        raise InputError(f"{text[:60]!r} is not a duration: write 110ns, 45us, 1.2ms or 3s")
    return Seconds(float(number * _SECONDS[unit]))


def parse_watts(text: str) -> Watts:
    """`700W`, `450 mW` or `1.2kW` to watts."""
    number, unit = _split(text, "power", "such as 700W, 450mW or 1.2kW")
    scales = {"W": Fraction(1), "mW": Fraction(1, KB), "kW": Fraction(KB)}
    if unit not in scales:
        raise InputError(f"{text[:60]!r} is not a power: write 700W, 450mW or 1.2kW")
    return Watts(float(number * scales[unit]))


def format_seconds(seconds: float) -> str:
    """A duration as text: `58 us`, `1.2 ms`, `3.4 s`."""
    for name, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _split(text: str, what: str, forms: str) -> tuple[Fraction, str]:
    """A number and its unit; refuses what is neither."""
    stripped = text.strip()
    match = _NUMBER.fullmatch(stripped) if len(stripped) <= 60 else None
    if match is None:
        raise InputError(f"{text[:60]!r} is not a {what}: write {forms}")
    if match[1] == "-":
        raise InputError(f"{text!r} is negative; a {what} is {forms}")
    return Fraction(Decimal(match[2])), match[3]


def _size_scale(unit: str, text: str) -> int:
    if not unit:
        return 1
    scale = _SIZES.get(unit.lower())
    if scale is None:
        if unit.upper() in ("K", "M", "G", "T", "P"):
            big = unit.upper()
            decimal = "kB" if big == "K" else f"{big}B"
            number = text.strip()[:-1].strip()
            raise InputError(
                f"{text!r} has two readings: "
                f"write {number}{decimal} (powers of 1000) or {number}{big}iB (powers of 1024)"
            )
        raise InputError(f"{text!r}: unknown unit {unit!r}; write {SIZE_FORMS}")
    if unit != unit.lower() and unit.endswith("b"):  # Gb, Mib: usually bits
        raise InputError(f"{text!r} reads as bits: write {unit[:-1]}B for bytes, or a rate as {unit[0]}bit/s")
    return scale


def _bounded(value: Fraction, text: str) -> int:
    return int(_bounded_fraction(value, text))


def _bounded_fraction(value: Fraction, text: str) -> Fraction:
    if value > _LARGEST:
        raise InputError(f"{text!r} is larger than any machine: the most accepted is {_LARGEST} bytes")
    return value


def _trimmed(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
