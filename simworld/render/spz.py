"""Niantic's .spz, splats in 16 to 64 bytes each, compressed: versions 2 to 4 are read, version 3 is written.

Its axes are right, up, back, those of a .ply right, down, forward: between them lies half a turn about the first.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simworld.extras import needed
from simworld.render.harmonics import MOST_DEGREE

Array = np.ndarray[Any, np.dtype[Any]]
MAGIC = b"NGSP"
HEADER = struct.Struct("<4sIIBBBB")  # magic, version, splats, degree, fractional bits, flags, reserved or streams
MOST_SPLATS = 10_000_000  # that other readers take
HALF_TURN = np.array([1.0, -1.0, -1.0])
TURNED = np.array([-1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1.0])
"""Signs that harmonics of degree 1 to 3 take by the half turn."""
MOST_FRACTION, MOST_WRITTEN = 24, 20  # bits of a coordinate after the point: that a file may say, and that ours do
WIDE = 0.15  # of a byte's range to a unit of a flat coefficient: colours out of 0 to 1 have a place, too
STEPS = 511  # of a quaternion's lesser numbers, from 0 to their most, the root of a half
NEARLY = 2e-3  # two numbers of a quaternion this near are as large: rounding may swap them
EXTENDED, ANTIALIASED = 2, 1  # flags
FRAME = 0xADBE0003  # the extension that names other axes than ours
MOST_EXTENSION = 2**16  # bytes
PIECE = 2**24  # bytes decompressed at once
DEFLATED = 1100  # bytes at most that one byte of deflate becomes


class _Header(NamedTuple):
    version: int
    splats: int
    degree: int
    fraction: int
    flags: int
    streams: int

    @property
    def sizes(self) -> list[int]:
        """Bytes of positions, opacities, colours, scales, quaternions and harmonics."""
        each = [9, 1, 3, 3, 4 if self.version > 2 else 3, 3 * ((self.degree + 1) ** 2 - 1)]
        return [self.splats * size for size in each]


def read_spz(path: Path) -> dict[str, Array]:
    """Return what a .spz holds, as the fields of a SplatState: its axes those of the .ply it was made from.

    Raises:
        ValueError: the file is none, damaged, of a version, degree or frame that is not known, or holds more or fewer
            splats than it says.
        ImportError: it is of version 4, and zstandard is not there.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        header, body = _inflated(raw, path)
    else:
        header = _header(raw, path)
        body = raw[HEADER.size :] if header.version < 4 else _streams(raw, header, path)
    if header.version < 4:
        body, extensions = body[: sum(header.sizes)], body[sum(header.sizes) :]
        _check_extensions(extensions, header, path)
        if len(body) < sum(header.sizes) or (extensions and not header.flags & EXTENDED):
            more = "more" if extensions else "fewer"
            raise ValueError(f"{path} says {header.splats} splats of degree {header.degree} and holds {more}; copy it.")
    return _unpacked(header, body)


def _header(raw: bytes, path: Path) -> _Header:
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no .spz; convert it, or copy it again.")
    header = _Header(*HEADER.unpack_from(raw)[1:])
    if header.version not in (2, 3, 4):
        raise ValueError(f"{path} is a .spz of version {header.version}; 2 to 4 are read. Write it anew.")
    if header.flags & ~(EXTENDED | ANTIALIASED):
        raise ValueError(f"{path} has the flags {header.flags:#x}, of which 0x1 and 0x2 are known; write it anew.")
    if header.degree > MOST_DEGREE:
        raise ValueError(f"{path} has harmonics of degree {header.degree}; write it anew with 0 to {MOST_DEGREE}.")
    if header.fraction > MOST_FRACTION:
        raise ValueError(f"{path} says {header.fraction} fractional bits, of {MOST_FRACTION} at most; copy it again.")
    if not header.splats:
        raise ValueError(f"{path} holds no splat; give another file.")
    if header.splats > MOST_SPLATS:
        raise ValueError(f"{path} says {header.splats} splats; a .spz has {MOST_SPLATS} at most. Split it.")
    return header


def _inflated(raw: bytes, path: Path) -> tuple[_Header, bytes]:
    """Return the header, and of what follows no more than it needs and extensions may take."""
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        header = _header(stream.decompress(raw, HEADER.size), path)
        if header.version == 4:
            raise ValueError(f"{path} is a .spz of version 4, which is not compressed as a whole; copy it again.")
        if sum(header.sizes) > DEFLATED * len(raw):
            raise ValueError(f"{path} says {header.splats} splats, which {len(raw)} bytes cannot hold; copy it again.")
        most, pieces = sum(header.sizes) + MOST_EXTENSION, [b""]
        while most > 0 and not stream.eof and (piece := stream.decompress(stream.unconsumed_tail, min(most, PIECE))):
            pieces.append(piece)
            most -= len(piece)
    except zlib.error as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again.") from error
    if not stream.eof:
        raise ValueError(f"{path} ends early, or holds more than the {header.splats} splats it says; copy it again.")
    return header, b"".join(pieces)


def _streams(raw: bytes, header: _Header, path: Path) -> bytes:
    """Return the body of a file of version 4, which follows a table of its parts, each compressed by zstd."""
    zstandard = needed("zstandard", "reading .spz of version 4", "formats")
    sizes = [size for size in header.sizes if size]
    (table,) = struct.unpack_from("<I", raw.ljust(20, b"\0"), HEADER.size)
    start = table + 16 * header.streams
    if not 32 <= table <= len(raw) or start > len(raw) or header.streams != len(sizes):
        raise ValueError(f"{path} has no table of {len(sizes)} parts, as its header needs; copy it again.")
    _check_extensions(raw[32:table], header, path)
    parts = []
    for wanted, (length, said) in zip(sizes, struct.iter_unpack("<QQ", raw[table:start]), strict=True):
        size = wanted
        if said != size or start + length > len(raw):
            raise ValueError(f"{path} says {header.splats} splats, and its parts are of other sizes; copy it again.")
        try:
            with zstandard.ZstdDecompressor().stream_reader(raw[start : start + length]) as stream:
                while size > 0 and (piece := stream.read(min(size, PIECE))):
                    parts.append(piece)
                    size -= len(piece)
                more = stream.read(1)
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again.") from error
        if size or more:
            raise ValueError(f"{path} says {header.splats} splats and holds {'more' if more else 'fewer'}; copy it.")
        start += length
    return b"".join(parts)


def _check_extensions(raw: bytes, header: _Header, path: Path) -> None:
    """Refuse other axes; what else makers of files add changes no splat, and is passed over."""
    place = 0
    while header.flags & EXTENDED and place + 8 <= len(raw):
        kind, length = struct.unpack_from("<II", raw, place)
        if kind == FRAME and raw[place + 8 : place + 12] not in (b"\4\0\0\0", b"\0\0\0\0"):
            raise ValueError(f"{path} has other axes than right, up, back; write it anew without that extension.")
        place += 8 + length


def _unpacked(header: _Header, body: bytes) -> dict[str, Array]:
    ends = np.cumsum(header.sizes)[:-1]
    parts = np.split(np.frombuffer(body, dtype=np.uint8), ends)
    positions, opacities, colours, scales, quats, harmonics = (part.reshape(header.splats, -1) for part in parts)
    low, middle, high = (positions.reshape(-1, 3, 3)[..., k].astype(np.int32) for k in range(3))
    fixed = low + (middle << 8) + (high << 16)
    means = np.where(fixed >= 2**23, fixed - 2**24, fixed) * 2.0**-header.fraction
    more = (harmonics.reshape(header.splats, -1, 3) - 128.0) / 128
    flat = (colours / 255 - 0.5) / WIDE
    return {
        "means": means * HALF_TURN + 0.0,  # no -0
        "quats": (_three_of_four(quats) if header.version > 2 else _first_three(quats)) * [1, *HALF_TURN],
        "scales": np.exp(scales / 16 - 10),
        "opacities": opacities[:, 0] / 255,
        "harmonics": np.concatenate([flat[:, None], more * TURNED[: more.shape[1], None]], 1),
    }


def _first_three(rows: Array) -> Array:
    """Return quaternions (w, x, y, z) of which a byte each says x, y and z."""
    imaginary = rows / 127.5 - 1
    real = np.sqrt(np.maximum(0, 1 - (imaginary**2).sum(1, keepdims=True)))
    return np.concatenate([real, imaginary], 1)


def _three_of_four(rows: Array) -> Array:
    """Return quaternions (w, x, y, z) of which 10 bits each say all but the largest, whose place 2 bits say."""
    word = np.ascontiguousarray(rows).view("<u4")[:, 0]
    fields = np.stack([word >> 20, word >> 10, word], 1) & 1023
    lesser = (fields & 511) * np.where(fields & 512, -1, 1) * (math.sqrt(0.5) / STEPS)
    found = np.empty((len(rows), 4))
    kept = np.arange(4) != (word >> 30)[:, None]  # of x, y, z, w
    found[kept] = lesser.ravel()
    found[~kept] = np.sqrt(np.maximum(0, 1 - (lesser**2).sum(1)))
    return np.roll(found, 1, 1)


def spz_bytes(values: dict[str, Array]) -> bytes:
    """Return a .spz of version 3 of the fields of a SplatState, which may be read and written again unchanged.

    Coordinates have as many bits after the point as the farthest leaves room for, 12 at 2 km, 20 at most. Scales are
    rounded by 3 %; those out of 5e-5 to 380 become these, harmonics out of -1 to 1 become these.

    Raises:
        ValueError: there are more than 10 million splats, or one is farther than 8388607.
    """
    count = len(values["means"])
    largest = float(np.abs(values["means"]).max())
    if count > MOST_SPLATS or not largest < 2**23 - 1:
        raise ValueError(
            f"A .spz holds {MOST_SPLATS} splats at most, none farther out than 8388606; got {count}, the farthest at "
            f"{largest}. Write a .ply."
        )
    bits = next(b for b in range(MOST_WRITTEN, -1, -1) if np.rint(largest * 2.0**b) < 2**23)
    fixed = np.rint(values["means"].astype(np.float64) * HALF_TURN * 2.0**bits).astype("<i4")
    degree = math.isqrt(values["harmonics"].shape[1]) - 1
    with np.errstate(divide="ignore"):
        scales = np.log(values["scales"].astype(np.float64)) + 10
    parts = [
        np.ascontiguousarray(fixed).view(np.uint8).reshape(count, 3, 4)[..., :3],
        _bytes(values["opacities"].astype(np.float64) * 255),
        _bytes(values["harmonics"][:, 0].astype(np.float64) * (WIDE * 255) + 127.5),
        _bytes(scales * 16),
        _quaternions(values["quats"].astype(np.float64) * [1, *HALF_TURN]),
        _harmonics(values["harmonics"][:, 1:].astype(np.float64) * TURNED[: (degree + 1) ** 2 - 1, None]),
    ]
    head = HEADER.pack(MAGIC, 3, count, degree, bits, 0, 0)
    return gzip.compress(head + b"".join(part.tobytes() for part in parts), mtime=0)


def _bytes(values: Array) -> Array:
    rounded: Array = np.floor(values + 0.5).clip(0, 255).astype(np.uint8)
    return rounded


def _harmonics(values: Array) -> Array:
    """Return a byte each, in steps of 1/16 for degree 1 and 1/8 for others, which compress well."""
    steps = np.where(np.arange(values.shape[1]) < 3, 8, 16)[:, None]
    centred = np.floor(values * 128 + 0.5) + 128
    rounded: Array = (np.floor((centred + steps // 2) / steps) * steps).clip(0, 255).astype(np.uint8)
    return rounded


def _quaternions(quats: Array) -> Array:
    """Return words [n] of quaternions (w, x, y, z); see `_three_of_four`."""
    for _ in range(3):  # what is read is written alike from the second on
        found = np.roll(quats / np.linalg.norm(quats, axis=1, keepdims=True), -1, 1)
        sizes = np.abs(found)
        largest = (sizes >= sizes.max(1, keepdims=True) - NEARLY).argmax(1)
        kept = np.arange(4) != largest[:, None]
        lesser = np.where(found[~kept] < 0, -1, 1)[:, None] * found[kept].reshape(-1, 3)
        steps = np.floor(np.abs(lesser) * (STEPS / math.sqrt(0.5)) + 0.5).clip(0, STEPS).astype(np.uint32)
        fields = steps | np.where((lesser < 0) & (steps > 0), 512, 0).astype(np.uint32)
        words = largest.astype(np.uint32) << 30 | fields[:, 0] << 20 | fields[:, 1] << 10 | fields[:, 2]
        quats = _three_of_four(words.astype("<u4")[:, None].view(np.uint8))
    packed: Array = words.astype("<u4")
    return packed
