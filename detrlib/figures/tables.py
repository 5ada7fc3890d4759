"""Tables of results as text, for a page (Markdown) and for a thesis (LaTeX)."""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown
from pandas.io.formats.style import Styler

from detrlib.errors import ConfigError
from detrlib.figures.style import DASH
from detrlib.files import write_atomic

LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$"}


def markdown_table(table: pd.DataFrame, formats: Mapping[str, str], **ranking) -> str:
    """`table` in Markdown, its index first. Arguments and bold values as in `latex_table`."""
    texts, best = _cells(table, formats, **ranking)
    texts = texts.where(~best, "**" + texts + "**")
    header = [str(table.index.name or ""), *map(str, table.columns)]
    alignment = ["---", *["---:"] * len(table.columns)]
    rows = [[str(name), *row] for name, row in zip(table.index, texts.to_numpy(), strict=True)]
    header, *rows = ([_plain(text) for text in row] for row in (header, *rows))
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, alignment, *rows]) + "\n"


def latex_table(
    table: pd.DataFrame,
    formats: Mapping[str, str],
    caption: str,
    label: str,
    lower_is_better: Collection[str] = (),
    unranked: Collection[str] = (),
) -> str:
    r"""`table` as a LaTeX table (needs booktabs and adjustbox), its index first and the best of each column in bold.

    formats: column -> format specification such as ".1f"; other columns are written as they are. The highest
    number is best, but the lowest in `lower_is_better`; `unranked` columns and text have no best. Values that look
    the same once rounded share the bold, unless all do. Missing values read as a dash. Names are escaped, `caption`
    is LaTeX. Raises ConfigError when an argument names a column that does not exist.
    """
    texts, best = _cells(table, formats, lower_is_better, unranked)
    named = texts.rename_axis(table.index.name or "").reset_index()
    styler = named.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    bold = np.where(best, "textbf:--rwrap;", "")
    written = styler.apply(lambda _: bold, axis=None, subset=texts.columns).to_latex(
        column_format="l" + "r" * len(texts.columns),
        caption=caption,
        label=label,
        hrules=True,
        position_float="centering",
    )
    box = r"{adjustbox}{max width=\linewidth}"  # of many columns, smaller than the text
    written = written.replace(r"\begin{tabular}", rf"\begin{box}" "\n" r"\begin{tabular}")
    written = written.replace(r"\end{tabular}", r"\end{tabular}" "\n" r"\end{adjustbox}")
    return written.replace("−", "$-$")  # which pdflatex has in formulas alone


def escaped(text: str) -> str:
    """Text for LaTeX in which no sign has a meaning."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def _for_everyone(table: pd.DataFrame | Styler) -> str | None:
    """A table of pandas as HTML in which empty cells are no headers, which would be read aloud and name nothing."""
    html = table._repr_html_()
    return html and re.sub(r"<th([^>]*)>(?:\s|&nbsp;)*</th>", r"<td\1></td>", html)


if shell := get_ipython():  # a notebook: for all that it shows
    for kind in (pd.DataFrame, Styler):
        shell.display_formatter.formatters["text/html"].for_type(kind, _for_everyone)


def _plain(text: str) -> str:
    """Text that stays what it is in a table of Markdown: no name ends a cell, or begins a tag of HTML."""
    return text.replace("<", "&lt;").replace("|", "\\|")


def _cells(table, formats, lower_is_better=(), unranked=()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The values as text, and which of them are the best of their column."""
    unknown = {*formats, *lower_is_better, *unranked} - set(table.columns)
    if unknown:
        raise ConfigError(f"no columns {sorted(unknown)} in the table; there are {list(table.columns)}")
    texts, best = pd.DataFrame(index=table.index, dtype=str), pd.DataFrame(index=table.index, dtype=bool)
    for name, values in table.items():
        texts[name] = [DASH if pd.isna(value) else format(value, formats.get(name, "")) for value in values]
        best[name] = False
        if pd.api.types.is_numeric_dtype(values) and name not in unranked and values.notna().any():
            position = np.nanargmin(values) if name in lower_is_better else np.nanargmax(values)
            same = texts[name] == texts[name].iloc[position]
            best[name] = same & ~(same | (texts[name] == DASH)).all()
    return texts, best


def save_table(table: pd.DataFrame, name: str, caption: str, folder: str | Path, note: str, **ranking) -> Markdown:
    """Write <name>.md, <name>.tex (labelled tab:<name>) and <name>.txt to `folder`, and return the table to be shown.

    It is shown below its caption, a text. Numbers get three decimals; note: where the table comes from; ranking:
    `lower_is_better` and `unranked` as of `latex_table`. Of a table without rows nothing is written.
    """
    if table.empty:
        return Markdown(f"*{caption} Nothing to show.*")
    formats = {column: ".3f" for column in table if pd.api.types.is_float_dtype(table[column])}
    written = markdown_table(table, formats, **ranking)
    latex = latex_table(table, formats, escaped(caption), f"tab:{name}", **ranking)
    for kind, text in {"md": written, "tex": latex, "txt": note.rstrip("\n") + "\n"}.items():
        write_atomic(Path(folder) / f"{name}.{kind}", lambda file, text=text: file.write_text(text))
    return Markdown(f"**{_plain(caption)}**\n\n{written}")


def shown(table: pd.DataFrame, decimals: int = 3, reason: str = "no rows") -> Styler | Markdown:
    """The table as a notebook shows it, missing values as a dash; or a line with the reason why it has no rows.

    decimals: as of `in_digits`.
    """
    if table.empty:
        return Markdown(f"*Nothing to show: {reason}.*")
    styler = table.style.format(partial(in_digits, decimals=decimals), na_rep=DASH, escape="html")
    return styler.format_index(escape="html", axis=0).format_index(escape="html", axis=1)


def in_digits(value: object, decimals: int) -> object:
    """A number that is not whole as text, with as many digits at any size: below ten these are its decimals."""
    if not isinstance(value, float) or not np.isfinite(value):
        return value
    size = int(np.log10(max(abs(round(value, decimals)), 1)))
    return f"{value:.{max(decimals - size, 0)}f}"


def with_spread(spread: pd.DataFrame, decimals: int = 3) -> pd.DataFrame:
    """Means over seeds with their standard deviations in words, "0.674 ± 0.006": a row per group, a column per metric.

    spread: as of `metrics.statistics.seed_table`. Groups of one seed have no deviation.
    """
    words = [
        DASH if pd.isna(mean) else f"{mean:.{decimals}f}" + ("" if pd.isna(std) else f" ± {std:.{decimals}f}")
        for mean, std in zip(spread["mean"], spread["std"], strict=True)
    ]
    table = spread.assign(words=words).pivot_table(
        index="group", columns="metric", values="words", aggfunc="first", sort=False
    )
    counts = spread.groupby("group", sort=False)["n"].max()
    return table.assign(seeds=counts).rename_axis(columns=None)
