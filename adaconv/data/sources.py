"""Where raw images lie: folders with any folders below them, or zip archives as downloaded; here or on an object store.

Found images come one at a time and in no particular order, so that memory does not grow with their number; nothing
that is made of them depends on the order.
"""

import contextlib
import errno
import hashlib
import logging
import posixpath
import re
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from adaconv import storage
from adaconv.errors import CredentialsError, UsageError
from adaconv.images import EXTENSIONS, ImageError

log = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800
_OF_WINDOWS = 0  # a zip's word for who made it
_OF_ONE_FILE = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # links in a circle and the like


def composed(name: str) -> str:
    """The same letters may be written in several ways (NFC here): a Mac's archive and a table differ in it."""
    return unicodedata.normalize("NFC", name)


class Member(NamedTuple):
    """Where a file lies in a zip archive, as the archive's directory says: enough to read it with no other lookup."""

    header_offset: int
    packed_bytes: int
    method: int
    flags: int
    crc: int


class Found(NamedTuple):
    """`uri` to read from, the archive's for a member; `source`: path below what was given, with forward slashes.

    `stamp` changes when the file does; `artist` and `style` as `layouts` reads them.

    A tuple, as is what it holds and what holds it: the driver reads and writes each of them some times as JSON, which
    takes a fifth of the time that a dataclass by its fields' names does.
    """

    uri: str
    source: str
    bytes: int = 0
    stamp: str = ""
    member: Member | None = None
    artist: str = ""
    style: str = ""

    @property
    def label(self) -> str:
        """The folders between the source and the file: `Impressionism/monet`, or nothing."""
        return posixpath.dirname(self.source)

    @classmethod
    def from_json(cls, values: list[Any]) -> Self:
        found = cls(*values)
        return found._replace(member=Member(*found.member)) if found.member else found


def iter_images(sources: Iterable[str], *, flag: str = "--source") -> Iterator[Found]:
    """Every file with an image's extension in the folders and archives that a flag names, one at a time.

    Raises:
        UsageError: a source is not there, is neither a folder nor a zip, or holds no images.
    """
    for source in sources:
        root = storage.absolute(source)
        images, others = 0, Counter[str]()
        for found in _walk_zip(root, source, flag) if _is_zip(root, source, flag) else _walk_folder(root):
            if _is_image(found.source):
                images += 1
                yield found
            else:
                others[_kind_of(found.source)] += 1
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        what = f"{others.total()} other files ({kinds}{', ...' if len(others) > 5 else ''})"
        if not images:
            what = what if others else "an empty folder or archive"
            raise UsageError(f"{flag} {source}: expected images ({', '.join(sorted(EXTENSIONS))}), found {what}")
        if others:
            log.info("%s: %s are not taken", source, what)


def list_images(sources: Iterable[str], *, flag: str = "--source") -> list[Found]:
    """Every image in folders, sorted; for jobs whose images are few and are read by their `uri`.

    Raises:
        UsageError: as iter_images, or a source is an archive.
    """
    for source in sources:
        if _is_zip(storage.absolute(source), source, flag):
            raise UsageError(f"{flag} {source}: expected a folder of images, found a zip; unpack it")
    return [f for source in sources for f in sorted(iter_images((source,), flag=flag), key=lambda f: f.source)]


def read_found(found: Found, *, max_bytes: int | None = None) -> bytes:
    """The bytes of an image, checked against the archive's checksum where it lies in one.

    Args:
        found: as it was listed.
        max_bytes: more are refused unread.

    Raises:
        ImageError: this file alone cannot be had: `crc_mismatch`, `deflate_error`, `encrypted_member`,
            `too_many_bytes`, `unknown_compression`, `unreadable`, `vanished`. A storage that fails altogether raises
            OSError.
    """
    if max_bytes is not None and found.bytes > max_bytes:
        raise ImageError("too_many_bytes", f"{found.bytes} bytes exceed {max_bytes}")
    if found.member is not None:
        return _read_member(found, found.member)
    try:
        return storage.read_bytes(found.uri, at_once=True)
    except FileNotFoundError:
        raise ImageError("vanished", "it was listed, and is not there any more, or is a link to nowhere") from None
    except CredentialsError:  # no fault of the image's
        raise
    except PermissionError:
        raise ImageError("unreadable", "no permission to read it") from None
    except OSError as error:
        if error.errno not in _OF_ONE_FILE:
            raise
        raise ImageError("unreadable", (error.strerror or str(error)).lower()) from None


def fingerprint(found: Iterable[Found]) -> str:
    """64 hex digits for a set of files as they are listed, whatever the order: all that is known but where they lie."""
    total = 0
    for one in found:
        text = "\0".join((one.source, str(one.bytes), one.stamp, one.artist, one.style))
        total += int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return f"{total % 2**256:064x}"


def _is_zip(root: str, source: str, flag: str) -> bool:
    if storage.is_directory(root):
        return False
    if not storage.exists(root):
        raise UsageError(f"{flag} {source}: expected a folder of images, found nothing there")
    if posixpath.splitext(root)[1].lower() != ".zip":
        raise UsageError(f"{flag} {source}: expected a folder of images or a .zip of them, found a file")
    return True


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in EXTENSIONS


def _kind_of(path: str) -> str:
    extension = posixpath.splitext(path)[1].lower()
    return extension if re.fullmatch(r"\.\w[\w-]{0,8}", extension) else "without an extension"


def _walk_folder(root: str) -> Iterator[Found]:
    for entry in storage.walk(root):
        yield Found(entry.uri, _printable(entry.path), entry.bytes, entry.stamp)


def _walk_zip(root: str, source: str, flag: str) -> Iterator[Found]:
    """Members of an archive; its directory is held in memory, about half a kilobyte a member.

    A folder that all members lie in and that has the archive's own name is no part of their paths: `train2017.zip`
    gives what the folder `train2017` gives.
    """
    try:
        with storage.open_binary(root) as file, zipfile.ZipFile(file) as archive:
            members = [(m, _name_of(m)) for m in archive.infolist() if not m.is_dir()]
    except UnicodeDecodeError as error:  # zipfile reads all names or none
        raise UsageError(
            f"{flag} {source}: a member's name is marked as UTF-8 and is none ({error.object!r:.100}); unpack the "
            "archive and give the folder"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, IndexError, ValueError, struct.error) as error:
        raise UsageError(
            f"{flag} {source}: expected a zip archive, found a damaged one ({error}); download it again"
        ) from None
    hidden = {name for _, name in members if any(_is_hidden(part) for part in name.split("/"))}
    if images := sum(map(_is_image, hidden)):
        log.info("%s: %d images are not taken whose names or folders begin with a dot or __MACOSX", source, images)
    members = [(m, name) for m, name in members if name not in hidden]
    own = posixpath.splitext(storage.name_of(root))[0] + "/"
    top = own if all(name.startswith(own) for _, name in members) else ""
    stamp = storage.stamp_of(root)  # a damaged member's checksum is that of the whole one
    for m, name in members:
        member = Member(m.header_offset, m.compress_size, m.compress_type, m.flag_bits, m.CRC)
        yield Found(root, _printable(name.removeprefix(top)), m.file_size, f"{stamp}-{m.CRC:08x}", member)


def _name_of(member: zipfile.ZipInfo) -> str:
    """The path within the archive, as plain as a folder's listing gives it.

    Many a zip program writes UTF-8 and does not say so; some write ./ in front, those of old .NET backslashes.
    """
    name, known = member.filename, bool(member.flag_bits & _UTF8)
    if not known:
        with contextlib.suppress(UnicodeError):
            name, known = name.encode("cp437").decode("utf-8"), True
    # In code pages of East Asia the second byte of many a letter is a backslash's.
    if known and member.create_system == _OF_WINDOWS and "/" not in name:
        name = name.replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _read_member(found: Found, member: Member) -> bytes:
    if member.flags & _ENCRYPTED:
        raise ImageError("encrypted_member", "the archive's member is encrypted")
    # The local header repeats the name and may have other extra fields than the directory: only their lengths count.
    here = member.header_offset >= 0
    header = storage.read_range(found.uri, member.header_offset, _LOCAL_HEADER.size) if here else b""
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise ImageError("deflate_error", "no member starts where the archive's directory says")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    start = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    packed = storage.read_range(found.uri, start, member.packed_bytes) if member.packed_bytes else b""
    if member.method == zipfile.ZIP_STORED:
        data = packed
    elif member.method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(packed, found.bytes + 1)  # never more than the directory admits
        except zlib.error as error:
            raise ImageError("deflate_error", str(error)) from None
        if len(data) != found.bytes or not (inflate.eof or found.bytes == 0):
            raise ImageError("deflate_error", f"expected {found.bytes} bytes, found {len(data)}")
    else:
        raise ImageError("unknown_compression", f"compression method {member.method} of the archive's member")
    if zlib.crc32(data) != member.crc:
        raise ImageError("crc_mismatch", f"expected CRC {member.crc:08x}, found {zlib.crc32(data):08x}")
    return data


def _printable(path: str) -> str:
    """A path as valid text: bytes of a file's name that are no UTF-8 are spelled out in hex."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
