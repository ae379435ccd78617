"""The opcodes of a pickle, passed over without building anything.

Two things need this: to know where a pickle ends, in files that hold several one behind the other, and that
no size or memo number in it is out of proportion: the interpreter's own unpickler allocates what a size says
before it looks whether the bytes are there.

The format: PEP 3154, PEP 574 and `pickletools` of the standard library.
"""

from __future__ import annotations

import pickletools
import struct
from mmap import mmap

Readable = bytes | mmap

STOP = ord(".")
TEXT_PUT, LONG_PUT, FRAME = ord("p"), ord("r"), 0x95
OUT_OF_BAND = {0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER"}
"""Opcodes whose objects are not in the file: no checkpoint has them."""


class BadPickleError(ValueError):
    """What is wrong with a pickle; whoever knows the file adds its name."""


def _argument_table() -> tuple[list[int], dict[int, int]]:
    """Bytes of opcodes with their arguments (0: varying, -1: no opcode), and widths of length prefixes."""
    fixed, prefixes = [-1] * 256, {}
    widths = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}
    four = (pickletools.TAKEN_FROM_ARGUMENT4, pickletools.TAKEN_FROM_ARGUMENT4U)
    for opcode in pickletools.opcodes:
        code = ord(opcode.code)
        length = 0 if opcode.arg is None else opcode.arg.n
        fixed[code] = 1 + length if length >= 0 else 0
        if length in four:
            prefixes[code] = 4
        elif length in widths:
            prefixes[code] = widths[length]
    return fixed, prefixes


_FIXED, _PREFIXES = _argument_table()
_TWO_LINES = {ord("c"), ord("i")}


def pickle_end(data: Readable, start: int = 0) -> int:
    """Where the pickle that begins at `start` ends: the byte behind its STOP.

    Raises:
        BadPickleError: it is cut off, is no pickle, or asks for memory that its bytes do not account for.
    """
    at, end = start, len(data)
    while at < end:
        code = data[at]
        size = _FIXED[code]
        if code == STOP:
            return at + 1
        if size < 0 or code in OUT_OF_BAND:
            raise BadPickleError(f"byte {at} is {_name(code)}, which no checkpoint's pickle has")
        if size == 0:
            size = _varying(data, at, code)
        elif code == LONG_PUT or code == FRAME:
            _check_claim(data, at, code, start)
        at += size
    raise BadPickleError(f"its pickle is cut off: {end - start} bytes hold no end of it")


def _varying(data: Readable, at: int, code: int) -> int:
    """Bytes of an opcode whose argument has a length of its own."""
    width = _PREFIXES.get(code)
    if width is None:
        return _lines(data, at, code)
    length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
    if length > len(data) - at:
        raise BadPickleError(
            f"byte {at} ({_name(code)}) announces {length} bytes, but only {len(data) - at} are left"
        )
    return 1 + width + length


def _lines(data: Readable, at: int, code: int) -> int:
    """Bytes of an opcode whose argument is text that ends with the line."""
    end = data.find(b"\n", at + 1) + 1
    if end and code in _TWO_LINES:
        end = data.find(b"\n", end) + 1
    if not end:
        raise BadPickleError(f"its pickle is cut off inside {_name(code)} at byte {at}")
    if code == TEXT_PUT:
        _check_memo(int(data[at + 1 : end - 1] or b"0"), at, at)
    return end - at


def _check_claim(data: Readable, at: int, code: int, start: int) -> None:
    if code == LONG_PUT:
        _check_memo(int.from_bytes(data[at + 1 : at + 5], "little"), at, at - start)
        return
    (length,) = struct.unpack_from("<Q", data, at + 1) if at + 9 <= len(data) else (len(data),)
    if length > len(data) - at:
        raise BadPickleError(f"byte {at} announces a frame of {length} bytes, only {len(data) - at} are left")


def _check_memo(number: int, at: int, most: int) -> None:
    """A pickle numbers what it remembers from 0; the unpickler makes a table up to the largest number."""
    if number > most:
        raise BadPickleError(
            f"byte {at} numbers an object {number}, more than could precede it: a memory bomb"
        )


def _name(code: int) -> str:
    known = [opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code]
    return known[0] if known else f"0x{code:02x}"
