"""Where raw images lie: folders with any folders below them. Listings are sorted, so that nothing depends on a disk."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaconv.errors import UsageError
from adaconv.images import EXTENSIONS


@dataclass(frozen=True)
class Found:
    """`uri` to read from; `source`: path below the folder that was given, with forward slashes."""

    uri: str
    source: str

    @property
    def label(self) -> str:
        """The folders between the source and the file: `Impressionism/monet`, or nothing."""
        parent = str(PurePosixPath(self.source).parent)
        return "" if parent == "." else parent


def list_images(sources: tuple[str, ...], *, flag: str = "--source") -> list[Found]:
    """Every file with an image's extension below the folders that a flag names.

    Raises:
        UsageError: a source is not there, is no folder, or holds no images.
    """
    found: list[Found] = []
    for source in sources:
        root = Path(source).expanduser().absolute()
        if not root.exists():
            raise UsageError(f"{flag} {source}: expected a folder of images, found nothing there")
        if not root.is_dir():
            raise UsageError(f"{flag} {source}: expected a folder of images, found a file")
        before = len(found)
        found += [Found(str(path), path.relative_to(root).as_posix()) for path in _walk(root)]
        if len(found) == before:
            files = sum(len(names) for _, _, names in os.walk(root))
            raise UsageError(
                f"{flag} {source}: expected images ({', '.join(sorted(EXTENSIONS))}), found "
                + (f"{files} other files" if files else "an empty folder")
            )
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith("."):
                yield Path(folder) / name
