"""TFRecord files and the SequenceExample messages in them, read and written without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from simworld.data.unpickle import opened

Bits = np.ndarray[Any, np.dtype[np.uint32]]
Value = bytes | int | float


@dataclass(frozen=True, kw_only=True)
class SequenceExample:
    """One record: values that belong to the whole of it, and values of each frame."""

    context: Mapping[str, Sequence[Value]]
    sequences: Mapping[str, Sequence[Sequence[Value]]]


def read_tfrecord(path: str | Path) -> Iterator[SequenceExample]:
    """Yield the records of a TFRecord file of SequenceExample messages, their checksums compared.

    Raises:
        ValueError: there is no file, it is cut short, a checksum is wrong or a message is not a SequenceExample; it
            names the file, the record and the byte where that record begins.
    """
    with opened(path) as file:
        number, start = 0, 0
        while head := file.read(12):
            where = f"{path}, record {number} at byte {start}"
            if len(head) < 12:
                raise ValueError(f"{where}: the file ends within its head; copy the file again.")
            (size,) = struct.unpack("<Q", head[:8])
            _check(head[:8], head[8:], f"{where}: the length")
            payload = file.read(size + 4) if start + size <= _size(path) else b""
            if len(payload) < size + 4:
                raise ValueError(f"{where}: it should have {size} bytes but the file ends sooner; copy the file again.")
            _check(payload[:size], payload[size:], f"{where}: the payload")
            try:
                yield _example(memoryview(payload)[:size])
            except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
                raise ValueError(f"{where} is not a SequenceExample ({error}); give another file.") from error
            number, start = number + 1, start + size + 16


def write_tfrecord(path: str | Path, examples: Iterable[SequenceExample]) -> None:
    """Write records to a TFRecord file with their checksums."""
    with open(path, "wb") as file:
        for example in examples:
            payload = _packed(example)
            head = struct.pack("<Q", len(payload))
            file.write(head + struct.pack("<I", _masked(head)) + payload + struct.pack("<I", _masked(payload)))


def crc32c(data: bytes | memoryview) -> int:
    """Return the Castagnoli checksum of some bytes.

    The bytes are cut into lanes of equal length that are worked through side by side. As the checksum is
    linear in the bits, two neighbours join by moving the first on over the length of the second.
    """
    if len(data) < 4:
        return _short(bytes(data))
    raw = np.frombuffer(data, dtype=np.uint8).copy()
    raw[:4] ^= 0xFF
    lanes = 1 << max(0, min(12, raw.size.bit_length() - 6))
    length = -(-raw.size // lanes)
    rows = np.zeros((lanes, length), dtype=np.uint8)
    rows.reshape(-1)[lanes * length - raw.size :] = raw
    # Lanes of zeros that start at each single bit tell how a checksum moves on over `length` bytes.
    sums = np.concatenate([np.zeros(lanes, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)])
    table, columns = _table(), np.ascontiguousarray(rows.T)
    for column in columns:
        index = sums & 0xFF
        index[:lanes] ^= column
        sums = table[index] ^ (sums >> np.uint32(8))
    sums, moved = sums[:lanes], sums[lanes:]
    while len(sums) > 1:
        sums, moved = _moved(sums[::2], moved) ^ sums[1::2], _moved(moved, moved)
    return int(sums[0]) ^ 0xFFFFFFFF


@cache
def _table() -> Bits:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


def _short(data: bytes) -> int:
    found, table = 0xFFFFFFFF, _table()
    for byte in data:
        found = int(table[(found ^ byte) & 0xFF]) ^ (found >> 8)
    return found ^ 0xFFFFFFFF


def _moved(sums: Bits, images: Bits) -> Bits:
    bits = (sums[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    moved: Bits = np.bitwise_xor.reduce(np.where(bits == 1, images, np.uint32(0)), axis=1)
    return moved


def _masked(data: bytes) -> int:
    found = crc32c(data)
    return (((found >> 15) | (found << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _check(data: bytes, said: bytes, what: str) -> None:
    if struct.unpack("<I", said)[0] != _masked(data):
        raise ValueError(f"{what} does not match its checksum; the file is damaged or not a TFRecord: copy it again.")


def _size(path: str | Path) -> int:
    return Path(path).stat().st_size


def _example(message: memoryview) -> SequenceExample:
    context: dict[str, Sequence[Value]] = {}
    sequences: dict[str, Sequence[Sequence[Value]]] = {}
    for number, part in _parts(message):
        for _, entry in _parts(_bytes(part)):
            name, value = _entry(_bytes(entry))
            if number == 1:
                context[name] = _feature(value)
            elif number == 2:
                sequences[name] = [_feature(_bytes(one)) for k, one in _parts(value) if k == 1]
    return SequenceExample(context=context, sequences=sequences)


def _entry(message: memoryview) -> tuple[str, memoryview]:
    found = {number: _bytes(part) for number, part in _parts(message)}
    return str(found.get(1, b""), "utf-8"), found.get(2, memoryview(b""))


def _feature(message: memoryview) -> list[Value]:
    """Return the values of a Feature: 1 is a list of bytes, 2 of floats, 3 of integers; numbers may be packed."""
    values: list[Value] = []
    for number, part in _parts(message):
        for k, value in _parts(_bytes(part)):
            if k != 1:
                continue
            if number == 1:
                values.append(bytes(_bytes(value)))
            elif number == 2:
                values += np.frombuffer(_bytes(value), "<f4").tolist()
            elif number == 3:
                values += [_signed(v) for v in ([value] if isinstance(value, int) else _varints(value))]
    return values


def _parts(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message; whole numbers as such, all else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"byte {at} has wire type {kind}")
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(message):
            raise ValueError(f"a field at byte {at} is {size} bytes long, where {len(message) - at} are left")
        yield key >> 3, message[at : at + size]
        at += size


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"the number {value} stands where a message is expected")
    return value


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at + shift // 7]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + shift // 7 + 1
    raise ValueError(f"the number at byte {at} has no end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _packed(example: SequenceExample) -> bytes:
    context = b"".join(_named(name, _packed_feature(v)) for name, v in example.context.items())
    frames = b"".join(
        _named(name, b"".join(_field(1, _packed_feature(v)) for v in rows)) for name, rows in example.sequences.items()
    )
    return _field(1, context) + _field(2, frames)


def _named(name: str, value: bytes) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(2, value))


def _packed_feature(values: Sequence[Value]) -> bytes:
    if all(isinstance(v, bytes) for v in values):
        return _field(1, b"".join(_field(1, v) for v in values if isinstance(v, bytes)))
    if all(isinstance(v, int) for v in values):
        return _field(3, _field(1, b"".join(_number(v & (1 << 64) - 1) for v in values if isinstance(v, int))))
    return _field(2, _field(1, np.asarray(values, "<f4").tobytes()))


def _field(number: int, value: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(value)) + value


def _number(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
