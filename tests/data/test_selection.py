"""Which images criteria mean: to be removed, or to get into no shard."""

import unicodedata

import pytest

from adaconv.data.selection import Criterion, Selector, keys_to_remove, read_exclusions, without
from adaconv.errors import UsageError


def row(key, state="kept", **values):
    told = {"key": key, "state": state, "source": f"{key}.jpg", "source_sha256": key * 2, "label": "", "artist": ""}
    return told | values


ROWS = [
    row("a", label="Impressionism", artist="monet"),
    row("b", label="Impressionism/late", artist="monet"),
    row("c", label="Impressionism2", artist="manet"),
    row("c", state="duplicate", label="Cubism", artist="picasso", source="copy.jpg"),
    row("d", state="quarantined", artist="monet"),
    row("e", state="excluded", artist="gone"),
]


@pytest.mark.parametrize(
    ("field", "value", "keys"),
    [
        ("key", "a", {"a"}),
        ("key", "bb", {"b"}),
        ("label", "Impressionism", {"a", "b"}),
        ("artist", "monet", {"a", "b"}),
        ("artist", "picasso", {"c"}),  # a copy of what another path keeps: the content goes
        ("source_pattern", "a.*", {"a"}),
        ("source_pattern", "c???.jpg", {"c"}),
        ("artist", "gone", set()),
    ],
)
def test_what_a_criterion_takes(field, value, keys):
    assert keys_to_remove(ROWS, [Criterion(field, value)]) == dict.fromkeys(keys, f"removed_by_{field}")


def test_brackets_stand_for_themselves():
    """They are in the names of copies; a shell's choice of letters would take other files, and not this one."""
    rows = [row("a", source="photos/a[1].jpg"), row("b", source="photos/a1.jpg")]
    assert keys_to_remove(rows, [Criterion("source_pattern", "photos/a[1].*")]) == {"a": "removed_by_source_pattern"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_are_the_same_however_they_are_composed(tmp_path, forms):
    """macOS writes names with accents apart, and people write lists with them on."""
    listed, stored = (unicodedata.normalize(form, "renée") for form in forms)
    assert listed != stored
    (tmp_path / "list.txt").write_text(f"artist:{listed}\nlabel:{listed}/late\nsource:{listed}/*.jpg\n")
    criteria = read_exclusions(str(tmp_path / "list.txt"))
    for one in (
        row("a", artist=stored),
        row("a", label=f"{stored}/late/more"),
        row("a", source=f"{stored}/x.jpg"),
    ):
        assert Selector(criteria).first(one)
    with pytest.raises(UsageError, match="did you mean 'renée'"):
        keys_to_remove([row("a", artist=stored)], [Criterion("artist", "rené")])


def test_a_criterion_that_takes_nothing_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"--artist mone: no image.*did you mean 'monet'"):
        keys_to_remove(ROWS, [Criterion("artist", "mone"), Criterion("key", "a")])


def test_a_list_may_name_what_is_not_there(caplog):
    listed = [Criterion("artist", "monett"), Criterion("label", "Cubism")]
    assert keys_to_remove(ROWS, [Criterion("key", "a")], listed) == {"a": "removed_by_key", "c": "removed_by_label"}
    assert "artist:monett: no image has it; did you mean 'monet'?" in caplog.text


def test_a_long_list_of_keys_is_looked_up_and_what_none_has_is_told_in_short(monkeypatch):
    rows = [row(f"{number:032x}") for number in range(2000)]
    criteria = [Criterion("key", f"{number:032x}") for number in range(0, 4000, 2)]
    compared = []
    monkeypatch.setattr(Criterion, "__eq__", lambda one, other: compared.append(1) or vars(one) == vars(other))
    monkeypatch.setattr("difflib.get_close_matches", lambda word, known, n: compared.extend(known) or [])
    assert len(keys_to_remove(rows, criteria[:1000])) == 1000
    with pytest.raises(UsageError, match=f"--key {2000:032x}: no image.*; and 995 more$"):
        keys_to_remove(rows, criteria)
    assert len(compared) < 10 * len(criteria)


LIST = """\ufeff# who asked us\r
artist: claude-monet\r
label:Impressionism/late

sha256:AA00000000000000000000000000000000000000000000000000000000000000
source:*/nude: *.jpg
artist:claude-monet
"""


def test_a_list_is_read_as_people_write_it(tmp_path):
    (tmp_path / "list.txt").write_text(LIST, newline="")
    criteria = read_exclusions(str(tmp_path / "list.txt"))
    assert criteria == [
        Criterion("artist", "claude-monet"),
        Criterion("label", "Impressionism/late"),
        Criterion("key", "aa" + "0" * 62),
        Criterion("source_pattern", "*/nude: *.jpg"),
    ]
    (tmp_path / "again.txt").write_text("\n".join(reversed([one.as_line() for one in criteria])))
    assert read_exclusions(str(tmp_path / "again.txt")) == criteria
    assert read_exclusions(None) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"monet", "line 1: 'monet'"),
        (b"artist:monet\nartist:", "line 2: 'artist:'"),
        (b"painter:monet", "expected artist:NAME, label:NAME, sha256:64 hex digits or source:PATTERN; found line 1"),
        (b"sha256:abc", "line 1"),
        (b"x\n" * 9, "line 5: 'x' and 4 more"),
        (b"artist:\xff", "expected text in UTF-8"),
        (None, "expected a text file, found none there"),
    ],
)
def test_a_line_that_names_nothing_is_refused(tmp_path, text, words):
    """What somebody meant by it would get into shards."""
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UsageError, match=words):
        read_exclusions(str(path))


def test_a_recipe_tells_of_a_list_by_what_it_names():
    one, other = [Criterion("artist", "a"), Criterion("key", "b")], [Criterion("artist", "a"), Criterion("key", "c")]
    assert without({"short_side": 512}, []) == {"short_side": 512}
    recipe = without({"short_side": 512}, one)
    assert recipe["exclude"]["criteria"] == 2
    assert without(recipe, one) == recipe
    assert without(recipe, other)["exclude"]["sha256"] != recipe["exclude"]["sha256"]
    assert without(recipe, []) == {"short_side": 512}


def test_criteria_are_counted_and_the_first_is_given():
    selector = Selector([Criterion("artist", "monet"), Criterion("label", "Impressionism"), Criterion("key", "zz")])
    assert [str(found and found.as_line()) for found in map(selector.first, ROWS[:3])] == ["artist:monet"] * 2 + [
        "None"
    ]
    assert list(selector.counts.values()) == [2, 2, 0]
    assert selector.unused(Criterion.as_line, selector.counts) == "sha256:zz: no image has it"
