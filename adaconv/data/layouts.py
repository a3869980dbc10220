"""What names and tables tell of images besides their folders: the artist and the style.

    wikiart    STYLE/ARTIST_TITLE.jpg: WikiArt as ArtGAN packs it, whose own csv files say no more than these names
    artist     ARTIST/TITLE.jpg, or ARTIST/YEAR/TITLE.jpg: WikiArt as it is fetched artist by artist
    csv        numbered files and a table of them, as Kaggle's Painter by Numbers has it
    plain      nothing
    auto       csv for what a table names, wikiart in folders with the name of one of WikiArt's styles, else plain

Folders of artists look like any others, so they are never guessed. Whatever was recognised is said with its evidence.
"""

import csv
import io
import logging
import posixpath
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from adaconv import storage
from adaconv.config.shard import Layout
from adaconv.data.sources import Found, composed, iter_images
from adaconv.errors import CredentialsError, UsageError

log = logging.getLogger(__name__)

# The first has artists by name, the other, older one by number.
_TABLES = ("all_data_info.csv", "train_info.csv")
_NAMES = ("new_filename", "filename")  # columns
_EVIDENCE = {"wikiart": "STYLE/ARTIST_TITLE", "artist": "ARTIST/TITLE"}
# The folders of WikiArt as it is downloaded, each with files named artist_title.jpg.
WIKIART_STYLES = frozenset(
    (
        "Abstract_Expressionism",
        "Action_painting",
        "Analytical_Cubism",
        "Art_Nouveau_Modern",
        "Baroque",
        "Color_Field_Painting",
        "Contemporary_Realism",
        "Cubism",
        "Early_Renaissance",
        "Expressionism",
        "Fauvism",
        "High_Renaissance",
        "Impressionism",
        "Mannerism_Late_Renaissance",
        "Minimalism",
        "Naive_Art_Primitivism",
        "New_Realism",
        "Northern_Renaissance",
        "Pointillism",
        "Pop_Art",
        "Post_Impressionism",
        "Realism",
        "Rococo",
        "Romanticism",
        "Symbolism",
        "Synthetic_Cubism",
        "Ukiyo_e",
    )
)


@dataclass(frozen=True)
class Table:
    """Artist and style by a file's name, as a csv has them."""

    uri: str
    rows: Mapping[str, tuple[str, str]]


def iter_artworks(sources: Iterable[str], layout: Layout) -> Iterator[Found]:
    """Every image of the sources, as iter_images gives them, with its artist and style.

    Raises:
        UsageError: as iter_images; or a table is none, or is not there though `layout` is `csv`.
    """
    for source in sources:
        table = find_table(source) if layout in ("auto", "csv") else None
        if layout == "csv" and table is None:
            raise UsageError(
                f"layout csv (shard.layout): expected {' or '.join(_TABLES)} in {source} or beside it, found neither "
                "that may be read"
            )
        counts = Counter[str]()
        for found in iter_images((source,)):
            told = table.rows.get(composed(posixpath.basename(found.source))) if table else None
            artist, style = told or artist_and_style(found.source, layout)
            counts["csv" if told else "path" if artist else "nothing"] += 1
            yield found._replace(artist=artist, style=style)
        log.info("%s: %s", source, _recognised(layout, table, counts))


def artist_and_style(source: str, layout: Layout) -> tuple[str, str]:
    """What a path tells in a layout; nothing where it is none of this layout's."""
    folder, name = posixpath.split(source)
    if layout == "artist":
        folders = [part for part in folder.split("/") if not part.isdigit()]  # years
        return folders[-1] if folders else "", ""
    style = posixpath.basename(folder)
    if layout in ("plain", "csv") or (layout == "auto" and style not in WIKIART_STYLES):
        return "", ""
    artist, mark, _ = posixpath.splitext(name)[0].partition("_")
    return (artist if mark else ""), style


def find_table(source: str) -> Table | None:
    """The table of a source, in it or beside it, if there is one that may be read.

    Raises:
        UsageError: it has not the columns of one.
    """
    root = storage.absolute(source)
    for folder in (root, posixpath.dirname(root)):
        for uri in (storage.join(folder, name) for name in _TABLES):
            try:
                is_there = storage.exists(uri)
            except CredentialsError:
                raise
            except PermissionError:  # credentials may reach no farther than the source
                continue
            if is_there:
                return Table(uri, _read_table(uri))
    return None


def _interned(row: Mapping[str, str | None], column: str) -> str:
    """A few thousand artists and styles are told of a hundred thousand times."""
    return sys.intern(row.get(column) or "")


def _read_table(uri: str) -> dict[str, tuple[str, str]]:
    with io.TextIOWrapper(storage.open_binary(uri), encoding="utf-8-sig", errors="replace", newline="") as text:
        reader = csv.DictReader(text)
        try:
            columns = reader.fieldnames or ()
            name = next((column for column in _NAMES if column in columns), None)
            if name is None or not {"artist", "style"} & set(columns):
                raise UsageError(
                    f"{uri}: expected columns {' or '.join(_NAMES)}, and artist or style; found "
                    f"{', '.join(columns)[:200] or 'none'}. --shard.layout plain reads no table"
                )
            return {
                composed(posixpath.basename(row[name])): (_interned(row, "artist"), _interned(row, "style"))
                for row in reader
                if row[name]
            }
        except csv.Error as error:
            raise UsageError(f"{uri}: expected a csv file, found damage in line {reader.line_num}: {error}") from None


def _recognised(layout: Layout, table: Table | None, counts: Counter[str]) -> str:
    """Which layout it is, and by how many names."""
    images = counts.total()
    if table and (counts["csv"] or layout == "csv"):
        path = f", {counts['path']} others are {_EVIDENCE['wikiart']}" if counts["path"] else ""
        return f"layout csv: {counts['csv']} of {images} names are in {table.uri}{path}"
    known = "wikiart" if layout == "auto" and counts["path"] else layout
    if known in _EVIDENCE:
        return f"layout {known}: {counts['path']} of {images} names are {_EVIDENCE[known]}"
    if layout == "plain":
        return "layout plain, as was asked for: names tell no artists and styles"
    return (
        f"layout plain: none of {images} names is {_EVIDENCE['wikiart']} of WikiArt's styles or in a table; "
        "--shard.layout artist takes folders for artists"
    )
