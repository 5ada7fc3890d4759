"""What a notebook keeps, and the document of it: all of it, in order, and it compiles with nothing over the margin."""

import re

import pandas as pd
import pytest

from detrlib.config import save_config
from detrlib.figures import style, tables, thesis

HOSTILE = r"50% of a_b & $c$ #1 \d {e} ~f ^g 中😀"  # means something to LaTeX, but for the last, which its fonts lack


@pytest.fixture
def book(tmp_path, tiny_config):
    run_dir = tmp_path / "run_1%"
    run_dir.mkdir()
    save_config(tiny_config(), run_dir / "config.yaml")
    return thesis.Thesis([run_dir], tmp_path / "thesis", first=["tab:main", "fig:high"])


def fill(book):
    """A figure of one text width and one higher than a page, one without anything, a wide table and an empty one."""
    drawn, _ = style.figure()
    assert book.figure(drawn, f"plain_{HOSTILE}", f"{HOSTILE}, a difference of −0.1 ± 0.2 – or none.") is drawn
    book.figure(style.figure(aspect=2.5)[0], "high", "Higher than a page.")
    nothing = style.styled(lambda: (_ for _ in ()).throw(style.Nothing("no run has any")))()
    assert book.figure(nothing, "none", "Nothing.") is nothing
    wide = pd.DataFrame({f"column_{n}": ["−0.123 ± 0.045"] * 3 for n in range(9)}, index=["a", "b_c", HOSTILE])
    book.table(wide, "main", "Wider than a page.")
    book.table(wide[:0], "empty", "No rows.")


def test_the_document_has_all_that_was_kept_what_matters_first_and_says_what_had_nothing(book):
    fill(book)
    shown = book.close()
    text = (book.folder / thesis.DOCUMENT).read_text()
    places = [text.index(part) for part in ("{main.tex}", "{high.pdf}", r"\appendix", "{plain_")]
    assert places == sorted(places) and r"Runs: run\_1\%." in text
    names = re.findall(r"\{([^{}]*)\.pdf\}", text)
    assert {path.stem for path in book.folder.glob("*.pdf")} == set(names) and len(names) == 2
    left_out = thesis.left_out(book.folder)
    assert left_out == ["fig:none (no run has any)", "tab:empty (no rows)"]
    assert "detrlib figures" in shown.data and "detrlib figures" in (book.folder / "high.txt").read_text()


def test_it_compiles_within_its_margins_and_its_figures_are_at_their_size(book, compiled):
    fill(book)
    book.close()
    log = compiled(book.folder / thesis.DOCUMENT)
    assert [float(points) for points in re.findall(r"Overfull .hbox \(([\d.]+)pt", log) if float(points) > 2] == []
    assert "Overfull \\vbox" not in log and "undefined" not in log
    (width,) = re.findall(r"textwidth=([\d.]+)in", (book.folder / thesis.DOCUMENT).read_text())
    assert float(width) == style.TEXT_WIDTH  # figures are neither enlarged nor made smaller


def test_it_compiles_whatever_is_kept(book, compiled):
    """LaTeX gives up where many floats wait for text that would part them."""
    for number in range(80):
        book.table(pd.DataFrame({"AP": range(20)}), f"table_{number}", "With 95 % intervals.")
    book.close()
    assert "undefined" not in compiled(book.folder / thesis.DOCUMENT)


def test_text_means_nothing_to_latex():
    assert tables.escaped("a_1 & 50%") == r"a\_1 \& 50\%"
    assert not re.search(r"(?<!\\)[%&#_]", tables.escaped(HOSTILE))
