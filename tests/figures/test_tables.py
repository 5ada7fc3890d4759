"""Tables in Markdown and LaTeX: numbers to the letter, the best in bold, names escaped."""

import re

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from detrlib.errors import ConfigError
from detrlib.figures import tables


def table():
    values = {"AP": [0.412, 0.4119, 0.3], "loss": [1.5, np.nan, 0.7], "epochs": [5, 6, 7], "kind": ["x", "y", "z"]}
    return pd.DataFrame(values, index=pd.Index(["soft_max", "50%", "a & b"], name="run"))


ARGUMENTS = {"formats": {"AP": ".2f", "loss": ".1f"}, "lower_is_better": ["loss"], "unranked": ["epochs"]}


def test_markdown_table_bolds_the_best():
    assert tables.markdown_table(table(), **ARGUMENTS).splitlines() == [
        "| run | AP | loss | epochs | kind |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| soft_max | **0.41** | 1.5 | 5 | x |",
        "| 50% | **0.41** | – | 6 | y |",
        "| a & b | 0.30 | **0.7** | 7 | z |",
    ]


def test_latex_table_bolds_the_best_and_escapes_names():
    lines = tables.latex_table(table(), caption=r"\emph{AP}", label="tab:ap", **ARGUMENTS).splitlines()
    assert r"\caption{\emph{AP}}" in lines and r"\label{tab:ap}" in lines and r"\begin{tabular}{lrrrr}" in lines
    start = lines.index(r"\midrule")
    assert lines[start + 1 : start + 4] == [
        r"soft\_max & \textbf{0.41} & 1.5 & 5 & x \\",
        r"50\% & \textbf{0.41} & – & 6 & y \\",
        r"a \& b & 0.30 & \textbf{0.7} & 7 & z \\",
    ]


def test_tables_without_a_winner_have_no_bold_and_unknown_columns_are_refused():
    tie = pd.DataFrame({"AP": [0.5, 0.5]}, index=["a", "b"])
    assert "**" not in tables.markdown_table(tie, {})
    for wrong in ({"formats": {"ap": ".1f"}}, {"formats": {}, "lower_is_better": ["ap"]}):
        with pytest.raises(ConfigError, match=r"no columns \['ap'\]"):
            tables.markdown_table(tie, **wrong)


def test_saved_tables_have_a_label_and_a_note_and_are_returned(tmp_path):
    shown = tables.save_table(table(), "main", "All runs.", tmp_path / "new", "made here", lower_is_better=["loss"])
    assert shown.data == "**All runs.**\n\n" + (tmp_path / "new" / "main.md").read_text()
    assert "| soft_max | **0.412** | 1.500 | 5 | x |" in shown.data
    latex = (tmp_path / "new" / "main.tex").read_text()
    assert r"\label{tab:main}" in latex and r"\textbf{0.412}" in latex and r"\caption{All runs.}" in latex
    assert (tmp_path / "new" / "main.txt").read_text() == "made here\n"


def test_notebooks_show_tables_without_empty_headers():
    """Of pandas: the corner, and the row of the index's name."""
    from importlib import reload  # what is done once in a notebook is done again here

    shell = InteractiveShell.instance()
    try:
        reload(tables)
        for shown in (table(), table().rename_axis("run"), table().rename_axis("run").style):
            html = shell.display_formatter.format(shown)[0]["text/html"]
            assert "<th" in html and not re.search(r"<th[^>]*>(\s|&nbsp;)*</th>", html)
            assert "soft_max" in html and "0.41" in html
    finally:
        InteractiveShell.clear_instance()


def test_captions_of_saved_tables_are_text(tmp_path):
    """A per cent sign would hide the rest of its line from LaTeX, and break the whole document."""
    shown = tables.save_table(table(), "main", "Runs & <95 % intervals>.", tmp_path, "")
    assert r"\caption{Runs \& <95 \% intervals>.}" in (tmp_path / "main.tex").read_text()
    assert shown.data.startswith("**Runs & &lt;95 % intervals>.**")


def test_a_table_without_rows_says_so_and_is_not_saved(tmp_path):
    assert "All runs. Nothing to show" in tables.save_table(table()[:0], "main", "All runs.", tmp_path, "").data
    assert not list(tmp_path.iterdir())


def test_a_table_is_shown_or_the_reason_why_it_has_no_rows():
    written = tables.shown(table(), 2).to_html()
    assert "0.41" in written and "0.412" not in written and "–" in written  # the missing loss
    assert tables.shown(table()[:0], reason="no runs").data == "*Nothing to show: no runs.*"


def test_large_numbers_are_shown_with_as_many_digits_as_small_ones():
    numbers = pd.DataFrame({"n": [0.12345, -9.87654, 12.3456, 123.456, 12345.6, np.nan], "k": 12345})
    written = tables.shown(numbers).to_html()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", written)
    assert cells[::2] == ["0.123", "-9.877", "12.35", "123.5", "12346", "–"] and set(cells[1::2]) == {"12345"}


def test_names_are_text_and_never_markup():
    """Reports in HTML show tables of Markdown, in which HTML means what it says, and those of pandas."""
    hostile = "<img src=x onerror=alert(1)>|a"
    named = pd.DataFrame({hostile: ["x", hostile], "n": [1, 2]}, index=["a", hostile])
    assert "<img" not in tables.shown(named).to_html()
    written = tables.markdown_table(named, {})
    assert "<img" not in written and {line.replace("\\|", "").count("|") for line in written.splitlines()} == {4}


def test_spread_over_seeds_in_words():
    rows = [("a", "AP", 0.6, 0.1414, 2), ("b", "AP", 0.25, np.nan, 1), ("b", "AR", np.nan, np.nan, 0)]
    words = tables.with_spread(pd.DataFrame(rows, columns=["group", "metric", "mean", "std", "n"]))
    assert words["AP"].tolist() == ["0.600 ± 0.141", "0.250"] and words["seeds"].tolist() == [2, 1]
    assert words.loc["b", "AR"] == "–"
