"""Artists and styles as the sets that people have tell them; small trees that look like those, which are not here."""

import random
import shutil
import unicodedata

import pytest

from adaconv import storage
from adaconv.config.shard import SubsetConfig
from adaconv.data.builds import spill_listing
from adaconv.data.layouts import artist_and_style, iter_artworks
from adaconv.data.sources import fingerprint
from adaconv.data.subset import Subset
from adaconv.errors import UsageError


@pytest.mark.parametrize(
    ("source", "layout", "wanted"),
    [
        ("Impressionism/claude-monet_water-lilies.jpg", "auto", ("claude-monet", "Impressionism")),
        ("wikiart/Ukiyo_e/hokusai_the_great_wave.jpg", "auto", ("hokusai", "Ukiyo_e")),
        ("Pop_Art/untitled.jpg", "auto", ("", "Pop_Art")),
        ("train2017/000000000009.jpg", "auto", ("", "")),
        ("my_own/claude-monet_water-lilies.jpg", "auto", ("", "")),
        ("my_own/claude-monet_water-lilies.jpg", "wikiart", ("claude-monet", "my_own")),
        ("Impressionism/claude-monet_water-lilies.jpg", "plain", ("", "")),
        ("Impressionism/claude-monet_water-lilies.jpg", "csv", ("", "")),
        ("claude-monet/water-lilies.jpg", "artist", ("claude-monet", "")),
        ("images/claude-monet/1899/water-lilies.jpg", "artist", ("claude-monet", "")),
        ("water-lilies.jpg", "artist", ("", "")),
    ],
)
def test_artist_and_style_are_read_off_the_path(source, layout, wanted):
    assert artist_and_style(source, layout) == wanted


ALL_DATA = (  # as Painter by Numbers has it
    "artist,date,genre,pixelsx,pixelsy,size_bytes,source,style,title,artist_group,in_train,new_filename\n"
    "Barnett Newman,1955.0,abstract,15530.0,6911.0,9201912.0,wikiart,Color Field Painting,Uriel,train_only,True,1.jpg\n"
    'Kiri Nichol,2013.0,,776.0,944.0,313571.0,wikiart,,"Clay, ""hand"" sized",train_and_test,True,2.jpg\n'
)
TRAIN = (
    "filename,artist,title,style,genre,date\n"
    "2.jpg,5b39c876740bfc1cfaf544721c43cac3,Uriel,Cubism,,1955\n"
    "3.jpg,96f6d7d5fa5d4d0a6bb0a1a08b7f8d2b,Other,Rococo,,\n"
)


def artworks(folder, layout="auto"):
    return {found.source: (found.artist, found.style) for found in iter_artworks((str(folder),), layout)}


@pytest.fixture
def painter(tmp_path):
    folder = tmp_path / "painter" / "train"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        (folder / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "painter" / "all_data_info.csv").write_text(ALL_DATA)
    return tmp_path / "painter"


def test_a_table_tells_of_numbered_files(painter, caplog):
    """In the source and beside it; the one that has artists by name goes before the one that has them by number."""
    (painter / "train_info.csv").write_text(TRAIN)
    wanted = {"1.jpg": ("Barnett Newman", "Color Field Painting"), "2.jpg": ("Kiri Nichol", ""), "3.jpg": ("", "")}
    with caplog.at_level("INFO"):
        assert artworks(painter / "train") == wanted
    assert f"layout csv: 2 of 3 names are in {painter}/all_data_info.csv" in caplog.text
    assert artworks(painter) == {f"train/{name}": told for name, told in wanted.items()}
    assert artworks(shutil.make_archive(str(painter / "train"), "zip", painter / "train")) == wanted
    assert artworks(painter, "plain") == {f"train/{name}": ("", "") for name in wanted}
    (painter / "all_data_info.csv").unlink()
    assert artworks(painter / "train", "csv")["3.jpg"] == ("96f6d7d5fa5d4d0a6bb0a1a08b7f8d2b", "Rococo")


@pytest.mark.parametrize(("table", "file"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_however_its_letters_are_composed(tmp_path, table, file):
    (tmp_path / unicodedata.normalize(file, "Étude.jpg")).write_bytes(b"x")
    told = unicodedata.normalize(table, "filename,artist,style\nÉtude.jpg,Ann,Rococo\n")
    (tmp_path / "all_data_info.csv").write_text(told.replace("filename", "new_filename"))
    assert list(artworks(tmp_path).values()) == [("Ann", "Rococo")]


def test_credentials_need_reach_no_farther_than_the_source(painter, monkeypatch):
    exists = storage.exists

    def inside(uri):
        if not uri.startswith(f"{painter}/train/"):
            raise PermissionError(13, "Forbidden", uri)
        return exists(uri)

    monkeypatch.setattr(storage, "exists", inside)
    assert artworks(painter / "train") == {f"{number}.jpg": ("", "") for number in (1, 2, 3)}
    with pytest.raises(UsageError, match="found neither that may be read"):
        artworks(painter / "train", "csv")


def test_a_subset_has_as_many_of_each_style_of_a_table(painter, tmp_path):
    draw = random.Random(0)
    styles = {f"{number}.jpg": draw.choice(["Cubism", "Cubism", "Cubism", "Rococo"]) for number in range(40)}
    lines = [f"{name},a,t,{style},,\n" for name, style in styles.items()]
    (painter / "all_data_info.csv").write_text("filename,artist,title,style,genre,date\n" + "".join(lines))
    for name in styles:
        (painter / "train" / name).write_bytes(b"x")
    taken = Subset(SubsetConfig(per_label=4), tmp_path).of(iter_artworks((str(painter),), "auto"))
    assert sorted(found.style for found in taken) == ["Cubism"] * 4 + ["Rococo"] * 4


def test_another_table_is_another_build(painter, tmp_path):
    """Though no image has changed: their rows have."""
    before = list(iter_artworks((str(painter),), "auto"))
    table = painter / "all_data_info.csv"
    table.write_text(ALL_DATA.replace("Kiri Nichol", "Kiri Nicholl"))
    after = list(iter_artworks((str(painter),), "auto"))
    assert fingerprint(before) != fingerprint(after)
    listing = spill_listing(after, tmp_path)
    assert list(listing.files()) == after


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "expected columns new_filename or filename, and artist or style; found none"),
        ("filename,genre\n1.jpg,x\n", "found filename, genre"),
        ("artist,style\na,b\n", "found artist, style"),
        ("filename,artist\n1.jpg," + "x" * 200_000, "damage in line"),
        (None, "expected all_data_info.csv or train_info.csv in"),
    ],
)
def test_a_table_that_is_none_is_answered(painter, table, words):
    path = painter / "all_data_info.csv"
    path.unlink()
    if table is not None:
        path.write_text(table)
    with pytest.raises(UsageError, match=words):
        artworks(painter, "csv")
    assert len(artworks(painter, "plain")) == 3


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("auto", "layout wikiart: 2 of 4 names are STYLE/ARTIST_TITLE"),
        ("wikiart", "layout wikiart: 3 of 4 names are STYLE/ARTIST_TITLE"),
        ("artist", "layout artist: 3 of 4 names are ARTIST/TITLE"),
        ("plain", "layout plain, as was asked for"),
    ],
)
def test_what_was_recognised_is_told_with_its_evidence(tmp_path, caplog, layout, told):
    for name in ("Rococo/a_1.jpg", "Cubism/b_2.jpg", "mine/c_3.jpg", "d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("INFO"):
        artworks(tmp_path, layout)
    assert told in caplog.text


def test_folders_of_artists_are_not_guessed(tmp_path, caplog):
    (tmp_path / "claude-monet").mkdir()
    (tmp_path / "claude-monet" / "claude-monet_1.jpg").write_bytes(b"x")
    with caplog.at_level("INFO"):
        assert artworks(tmp_path) == {"claude-monet/claude-monet_1.jpg": ("", "")}
    assert "none of 1 names is STYLE/ARTIST_TITLE" in caplog.text
    assert "--shard.layout artist" in caplog.text
