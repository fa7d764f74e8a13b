"""Image files made byte by byte: what no encoder would write."""

import struct
import zlib


def chunk(name: bytes, body: bytes = b"", right: bool = True) -> bytes:
    """A chunk of a PNG, with the right checksum or a wrong one."""
    crc = zlib.crc32(name + body) ^ (not right)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png(rows: list[bytes], width: int, depth: int = 8, colour: int = 2, before: bytes = b"",
        after: bytes = b"") -> bytes:  # fmt: skip
    """``colour``: 0 grey, 2 RGB, 3 palette; chunks stand ``before`` and ``after`` the pixels."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", pixels) + after
            + chunk(b"IEND"))  # fmt: skip


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


def riff(name: bytes, body: bytes) -> bytes:
    """A chunk of a WebP."""
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def exif(*entries: bytes) -> bytes:
    """An EXIF block that holds entries of a directory."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def short(tag: int, value: int) -> bytes:
    return entry(tag, 3, 1, struct.pack("<H", value))


def tiff(pixels: bytes, width: int, height: int, bits: tuple[int, ...] = (8, 8, 8), white: int = 2,
         more: tuple[tuple, ...] = (), big: bool = False) -> bytes:  # fmt: skip
    """``white``: 0 white is 0, 1 black is 0, 2 RGB; ``more``: (tag, type, count, bytes) each."""
    body, entries = pixels + bytes(len(pixels) % 2), []
    start, room, packing = (16, 8, "<HHQ") if big else (8, 4, "<HHI")
    tags = {
        256: (3, 1, struct.pack("<H", width)), 257: (3, 1, struct.pack("<H", height)),
        258: (3, len(bits), struct.pack(f"<{len(bits)}H", *bits)), 259: (3, 1, b"\1\0"),
        262: (3, 1, struct.pack("<H", white)), 273: (4, 1, struct.pack("<I", start)),
        277: (3, 1, struct.pack("<H", len(bits))), 278: (3, 1, struct.pack("<H", height)),
        279: (4, 1, struct.pack("<I", len(pixels))), **{tag: rest for tag, *rest in more},
    }  # fmt: skip
    for tag, (kind, count, value) in sorted(tags.items()):
        if len(value) > room:
            where, body = start + len(body), body + value + bytes(len(value) % 2)
            value = where.to_bytes(room, "little")
        entries.append(struct.pack(packing, tag, kind, count) + value.ljust(room, b"\0"))
    count, end = struct.pack("<Q" if big else "<H", len(entries)), (start + len(body))
    head = b"II+\0\x08\0\0\0" if big else b"II*\0"
    return head + end.to_bytes(room, "little") + body + count + b"".join(entries) + bytes(room)
