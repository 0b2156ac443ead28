"""The report's page: what is in the file, and that it works in a browser."""

from __future__ import annotations

import pytest

from kp_training.evaluation.page import Page, shown


def test_values_are_shown_as_a_reader_wants_them():
    assert [shown(v) for v in (None, float("nan"), 3, 0.12345, 12.34, 4567.8)] == [
        "-", "-", "3", "0.123", "12.3", "4568",
    ]  # fmt: skip
    assert shown((0.5, 0.25)) == "0.500 ± 0.250"


def test_a_table_marks_the_best_and_escapes_words(tmp_path):
    page = Page("<b>title</b>")
    rows = [{"method": "a & b", "share": (0.5, 0.1), "error": 2.0}, {"method": "c", "share": 0.7}]
    page.table(rows, best={"share": "max", "error": "min"})
    page.write(tmp_path / "page.html")
    words = (tmp_path / "page.html").read_text()
    assert '<td class="best" data-value="0.7">0.700</td>' in words
    assert '<td class="best" data-value="2.0">2.000</td>' in words
    assert words.count('class="best"') == 2
    assert "a &amp; b" in words and "<b>title" not in words
    assert '<td data-value="">-</td>' in words  # c has no error


def test_a_table_knows_no_other_best():
    with pytest.raises(KeyError):
        Page("").table([{"a": 1}], best={"a": "most"})
