"""Numbers as the bits that files hold, in numpy, which knows neither bfloat16 nor fp8.

Bit patterns are those of IEEE 754 and of the OCP 8-bit formats (Open Compute Project, "OFP8", 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.manifest import ITEM_SIZES

Bits = npt.NDArray[Any]
"""Unsigned integers of the size of the numbers, of any shape."""
Floats = npt.NDArray[np.floating[Any]]

_EXPONENTS = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e5m2": 0x7C,
}
"""All exponent bits set: infinite, or not a number."""
_SIGNS = {1: 0x80, 2: 0x8000, 4: 0x8000_0000, 8: 0x8000_0000_0000_0000}
_NATIVE = {"float64": np.float64, "float32": np.float32, "float16": np.float16}


def _e4m3fn() -> npt.NDArray[np.float32]:
    """The value of every pattern: 4 exponent bits with bias 7, 3 of the fraction, all ones is no number."""
    patterns = np.arange(256)
    exponent, fraction = (patterns >> 3) & 15, patterns & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    size[patterns & 0x7F == 0x7F] = np.nan
    return np.where(patterns < 128, size, -size).astype(np.float32)


_E4M3FN = _e4m3fn()


def bits_type(dtype: str) -> np.dtype[Any]:
    """Unsigned integers as wide as the dtype's elements."""
    return np.dtype(f"u{ITEM_SIZES[dtype]}")


def is_float(dtype: str) -> bool:
    """Whether a dtype has a sign and an exponent."""
    return "float" in dtype


def nonfinite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_] | None:
    """Where a number is infinite or not a number; None when that is nowhere."""
    if dtype in _NATIVE:
        finite = np.isfinite(bits.view(_NATIVE[dtype]))
        return None if finite.all() else ~finite
    if dtype == "float8_e4m3fn":  # no infinities, one pattern (of either sign) is not a number
        found = (bits & bits.dtype.type(0x7F)) == 0x7F
    elif dtype in _EXPONENTS:
        exponent = bits.dtype.type(_EXPONENTS[dtype])
        found = (bits & exponent) == exponent
    else:
        return None
    return found if found.any() else None


def negative(bits: Bits, dtype: str) -> npt.NDArray[np.bool_] | None:
    """Where a floating-point number is below zero; None when that is nowhere. -0 is not."""
    if not is_float(dtype):
        return None
    found = bits > bits.dtype.type(_SIGNS[bits.itemsize])
    return found if found.any() else None


def as_floats(bits: Bits, dtype: str) -> Floats:
    """The numbers, exactly: integers as float64, floating-point ones as float32 where that holds them."""
    if dtype in ("float64", "float32"):
        return bits.view(_NATIVE[dtype])
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (bits.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    if dtype == "float8_e4m3fn":
        return _E4M3FN[bits]
    signed = bits if dtype in ("uint8", "bool") else bits.view(f"i{bits.itemsize}")
    return signed.astype(np.float64)


def rounded(bits: Bits, dtype: str, to: str) -> Bits | None:
    """float32 numbers in a lower precision, to nearest even, as bits; None for other conversions.

    For bfloat16 half a unit of the last place that stays is added, or a little less where that is even, and
    the rest is cut off; what is not a number would overflow to infinity or zero, and is set apart.
    """
    if dtype == to:
        return bits
    if dtype != "float32":
        return None
    if to == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            return bits.view(np.float32).astype(np.float16).view(np.uint16)
    if to != "bfloat16":
        return None
    even = (bits >> np.uint32(16)) & np.uint32(1)
    result = ((bits + (even + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(bits.view(np.float32))
    if nan.any():
        result[nan] = 0x7FC0
    return result
