"""Pairs are pure functions of two lists and a seed."""

import unicodedata
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adaconv.config.stylize import OptionsConfig
from adaconv.errors import UsageError
from adaconv.orchestration.stylize_plan import _check
from adaconv.stylize.pairing import Pair, pair_up

CONTENTS, STYLES = ["a", "b/c", "d"], ["s", "t", "u", "v", "w"]


def test_a_grid_and_a_zip():
    assert [(p.content, p.style) for p in pair_up("grid", ["a", "b"], ["s", "t"])] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(p.content, p.style) for p in pair_up("zip", ["a", "b"], ["s", "t"])] == [(0, 0), (1, 1)]
    with pytest.raises(UsageError, match="as many styles as contents, found 3, 5"):
        pair_up("zip", CONTENTS, STYLES)


def test_random_pairs_follow_from_the_seed_and_stay_when_contents_are_added():
    pairs = pair_up("random:2", CONTENTS, STYLES, seed=3)
    assert pairs == pair_up("random:2", CONTENTS, STYLES, seed=3) != pair_up("random:2", CONTENTS, STYLES, seed=4)
    assert pairs == pair_up("random:2", [*CONTENTS, "z"], STYLES, seed=3)[:6]
    for content in range(3):
        assert len({pair.style for pair in pairs if pair.content == content}) == 2
    counts = [0] * 5
    for pair in pair_up("random:2", ["x"] * 1000, STYLES):
        counts[pair.style] += 1
    assert all(300 < count < 500 for count in counts)
    # Frozen: a release that draws others would make other outputs of the same command.
    assert [pair.style for pair in pairs] == FROZEN
    assert pair_up("random:5", CONTENTS, STYLES) == pair_up("grid", CONTENTS, STYLES)  # all there are, in their order
    with pytest.raises(UsageError, match="at least 6 styles, found 5"):
        pair_up("random:6", CONTENTS, STYLES)


FROZEN = [1, 2, 3, 4, 2, 4]


def test_random_pairs_sort_no_more_styles_than_they_take(monkeypatch):
    def in_full(place):
        return sorted(np.argsort(np.random.Philox(key=[3, place]).random_raw(10_000), kind="stable")[:5].tolist())

    expected, argsort, sorted_words = [style for place in range(20) for style in in_full(place)], np.argsort, []
    monkeypatch.setattr(np, "argsort", lambda words, **how: sorted_words.append(len(words)) or argsort(words, **how))
    pairs = pair_up("random:5", ["x"] * 20, ["y"] * 10_000, seed=3)
    assert [pair.style for pair in pairs] == expected
    assert sum(sorted_words) == len(pairs)


def test_a_file_of_pairs(tmp_path):
    rows = {"content": ["d", "a", "d"], "style": ["t", "s", "t"], "alpha": [0.5, None, 0.5]}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("\ufeffcontent,style,alpha\nd,t,0.5\na,s,\nd,t,0.5\n", encoding="utf-8")
    for name in ("p.parquet", "p.csv"):
        pairs = pair_up(str(tmp_path / name), CONTENTS, STYLES, check=lambda o: {k: float(v) for k, v in o.items()})
        assert pairs == [Pair(0, 0), Pair(2, 1, {"alpha": 0.5})]


def test_a_row_that_states_a_default_is_no_other_pair(tmp_path):
    (tmp_path / "p.csv").write_text("content,style,alpha,color\na,s,,\na,s,1,\na,s,1.0,style\na,s,0.5,\n")
    pairs = pair_up(str(tmp_path / "p.csv"), CONTENTS, STYLES, check=partial(_check, OptionsConfig()))
    assert pairs == [Pair(0, 0), Pair(0, 0, {"alpha": 0.5})]


def test_a_file_of_pairs_whose_names_are_numbers(tmp_path):
    pq.write_table(pa.table({"content": [1, 0], "style": [0, 1]}), tmp_path / "p.parquet")
    assert pair_up(str(tmp_path / "p.parquet"), ["0", "1"], ["0", "1"]) == [Pair(0, 1), Pair(1, 0)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "content,style\nx,s\n",
            "row 1: expected the name of a content .*holds.* such as 'a'; found 'x'",
        ),
        (
            "content,style\na,s\na,x\n",
            "row 2: expected the name of a style .*holds.* such as 's'; found 'x'",
        ),
        (
            "content,style,alpha\nx,s,1\na,s,1\nb/k,s,1\na,s,2\n",
            "row 1: .* such as 'a'; found 'x'\n.* row 3: .* such as 'b/c'; found 'b/k'\n.* row 4: alpha too large$",
        ),
        ("content,style\n" + "x,s\n" * 50, "(?s)^(?!.*row 11:).*row 10: .* found 'x'$"),
        ("content,style\ntwice,s\n", "row 1: more than one content is called 'twice'"),
        ("content\na\n", "row 1: expected columns content and style, found content"),
        ("Content,Style\na,s\n", "row 1: expected columns content and style, found Content, Style"),
        ("content,style\na,s\na,s,\n", "row 2: expected 2 fields, as the first line has, found 3"),
        ("content,style,alpha\na,s,0.5,x,y\n", "row 1: expected 3 fields, as the first line has, found 5"),
        ("content,style\n", "expected rows, found none"),
        ("content;style\na;s\n", "row 1: expected columns parted by commas, found 'content;style'"),
    ],
)
def test_wrong_rows_are_named(tmp_path, text, words):
    (tmp_path / "p.csv").write_text(text)

    def check(options):
        if float(options.get("alpha", 0)) > 1:
            raise UsageError("alpha too large")
        return options

    with pytest.raises(UsageError, match=words):
        pair_up(str(tmp_path / "p.csv"), [*CONTENTS, "twice", "twice"], STYLES, check=check)
    with pytest.raises(UsageError, match="found nothing there"):
        pair_up(str(tmp_path / "none.csv"), CONTENTS, STYLES)


def test_pairs_are_found_with_spaces_behind_commas_and_letters_composed_otherwise(tmp_path):
    names = [unicodedata.normalize("NFD", "café.png"), "b.png"]
    table = unicodedata.normalize("NFC", "content, style, alpha\ncafé.png, s, 0.5\n")
    (tmp_path / "p.csv").write_text(table, encoding="utf-8")
    assert pair_up(str(tmp_path / "p.csv"), names, ["s"]) == [Pair(0, 0, {"alpha": "0.5"})]
