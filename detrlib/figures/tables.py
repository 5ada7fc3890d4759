"""Tables of results as text, for a page (Markdown) and for a thesis (LaTeX)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd


def markdown_table(
    table: pd.DataFrame,
    formats: Mapping[str, str],
    lower_is_better: Collection[str] = (),
    unranked: Collection[str] = (),
) -> str:
    """`table` in Markdown, its index first. Arguments and bold values as in `latex_table`."""
    cells = _cells(table, formats, lower_is_better, unranked, bold="**{}**")
    rows = [[str(run), *row] for run, row in zip(table.index, cells, strict=True)]
    header = [str(table.index.name or ""), *map(str, table.columns)]
    alignment = ["---", *["---:"] * len(table.columns)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, alignment, *rows]) + "\n"


def latex_table(
    table: pd.DataFrame,
    formats: Mapping[str, str],
    caption: str,
    label: str,
    lower_is_better: Collection[str] = (),
    unranked: Collection[str] = (),
) -> str:
    r"""`table` as a LaTeX table (needs \usepackage{booktabs}), its index first and the best of each column in bold.

    formats: column -> format specification such as ".1f"; other columns are written as they are. The highest
    number is best, but the lowest in `lower_is_better`; `unranked` columns and text have no best. Values that look
    the same once rounded share the bold, unless all do. Missing values read as a dash. Names are escaped, `caption`
    is LaTeX. Raises ValueError when an argument names a column that does not exist.
    """
    cells = _cells(table, formats, lower_is_better, unranked, bold=r"\textbf{{{}}}", escape=_escape_latex)
    rows = [[_escape_latex(str(run)), *row] for run, row in zip(table.index, cells, strict=True)]
    header = [_escape_latex(str(name)) for name in (table.index.name or "", *table.columns)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cells(table, formats, lower_is_better, unranked, bold, escape=str) -> list[list[str]]:
    """The formatted values, row by row."""
    unknown = {*formats, *lower_is_better, *unranked} - set(table.columns)
    if unknown:
        raise ValueError(f"no columns {sorted(unknown)} in the table; there are {list(table.columns)}")
    columns = []
    for name in table.columns:
        values = table[name]
        texts = ["–" if pd.isna(value) else escape(format(value, formats.get(name, ""))) for value in values]
        if pd.api.types.is_numeric_dtype(values) and name not in unranked and values.notna().any():
            position = np.nanargmin(values) if name in lower_is_better else np.nanargmax(values)
            best = texts[position]
            if any(text not in (best, "–") for text in texts):
                texts = [bold.format(text) if text == best else text for text in texts]
        columns.append(texts)
    return [list(row) for row in zip(*columns, strict=True)]


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def save_table(table: pd.DataFrame, folder: Path, name: str, caption: str, note: str, **ranking) -> None:
    """Write <name>.md, <name>.tex (labelled tab:<name>) and <name>.txt, the `note` of where it comes from.

    Numbers get three decimals; ranking: `lower_is_better` and `unranked` as of `latex_table`.
    """
    formats = {column: ".3f" for column in table if pd.api.types.is_float_dtype(table[column])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown_table(table, formats, **ranking))
    (folder / f"{name}.tex").write_text(latex_table(table, formats, caption, f"tab:{name}", **ranking))
    (folder / f"{name}.txt").write_text(note.rstrip("\n") + "\n")


def stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of the same columns below each other; an empty one for none."""
    return pd.concat(tables) if tables else pd.DataFrame()


def with_spread(spread: pd.DataFrame, decimals: int = 3) -> pd.DataFrame:
    """Means over seeds with their standard deviations in words, "0.674 ± 0.006": a row per group, a column per metric.

    spread: as of `metrics.statistics.seed_table`. Groups of one seed have no deviation.
    """
    words = [
        "–" if pd.isna(mean) else f"{mean:.{decimals}f}" + ("" if pd.isna(std) else f" ± {std:.{decimals}f}")
        for mean, std in zip(spread["mean"], spread["std"], strict=True)
    ]
    table = spread.assign(words=words).pivot_table(
        index="group", columns="metric", values="words", aggfunc="first", sort=False
    )
    counts = spread.groupby("group", sort=False)["n"].max()
    return table.assign(seeds=counts).rename_axis(columns=None)
