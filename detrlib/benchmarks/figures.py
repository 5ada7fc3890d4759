"""Tables and figures of what `detrlib.benchmarks.measure` measured, from its tidy results."""

import operator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detrlib.benchmarks.measure import BOTH, FORWARD, KEPT
from detrlib.figures.overlay import text_colour
from detrlib.figures.style import MUTED, figure, run_colours, save, styled
from detrlib.figures.tables import in_digits, markdown_table
from detrlib.files import write_json

PASSES = (FORWARD, BOTH)
TO_SOFTMAX, TO_LIBRARY = "time / softmax", "entmax library / time"
LIBRARIES = {"entmax": "entmax library", "adasplash": "AdaSplash"}  # in words; "entmax" is a transform too
MARKERS = {"detrlib": "o", "torch": "d", "entmax": "s", "adasplash": "^"}


def transform_table(results: pd.DataFrame) -> pd.DataFrame:
    """A row per case, transform and source: milliseconds of both passes, how long the two together take compared to
    `torch.softmax` and to the entmax library, and memory in maps.
    """
    measured = results[results.benchmark == "transform"]
    keys = ["case", "transform", "source"]
    wide = measured.pivot(index=keys, columns="quantity", values="value").reindex(columns=[*PASSES, "memory"])
    wide = wide.loc[pd.MultiIndex.from_frame(measured[keys].drop_duplicates())]  # in the order of measurement
    both = wide[PASSES[1]].to_dict()
    table = pd.DataFrame({f"{name} [ms]": 1000 * wide[name] for name in PASSES})
    table[TO_SOFTMAX] = [value / both.get((case, "softmax", "torch"), np.nan) for (case, _, _), value in both.items()]
    table[TO_LIBRARY] = [both.get((case, name, "entmax"), np.nan) / value for (case, name, _), value in both.items()]
    table["memory [maps]"] = wide["memory"]
    return table


def ratio_table(results: pd.DataFrame, benchmark: str, reference: str) -> pd.DataFrame:
    """Of benchmark "step" or "tvmax": seconds by case, transform and source, and compared to the transform or source
    called `reference`; and the largest error of a weight, where it was measured.
    """
    rows = results[results.benchmark == benchmark].set_index(["case", "transform", "source"])
    table = rows.loc[rows.unit == "s", ["value", "low", "high", "repeats"]]
    table["repeats"] = table.repeats.astype(int)
    references = {key[0]: value for key, value in table.value.items() if reference in key[1:]}
    table[f"time / {reference}"] = [value / references[case] for (case, _, _), value in table.value.items()]
    errors = rows.loc[rows.quantity == "error", "value"]
    if len(errors):
        table["largest error"] = errors.map("{:.1e}".format)
    return table.rename(columns={"value": "median [s]", "low": "quartile 1 [s]", "high": "quartile 3 [s]"})


def error_table(results: pd.DataFrame) -> pd.DataFrame:
    """The largest error of a weight, and the relative one of the gradients of alpha: by transform and source."""
    measured = results[results.benchmark == "accuracy"]
    table = measured.pivot(index=["case", "transform"], columns="source", values="value")
    table = table.loc[pd.MultiIndex.from_frame(measured[["case", "transform"]].drop_duplicates())]  # as measured
    return table.map("{:.1e}".format, na_action="ignore")


def check_targets(results: pd.DataFrame) -> pd.DataFrame:
    """What was aimed at, what was measured, the worst where there are several, and whether it is met."""
    times = transform_table(results).xs("detrlib", level="source").reset_index()
    errors = results[(results.benchmark == "accuracy") & (results.source == "detrlib")].set_index("case").value
    rows = []
    for name, bound in {"sparsemax": 5, "entmax15": 8, "alpha_entmax": 10}.items():
        least = times[TO_LIBRARY][times["transform"] == name].min()
        rows.append((f"{name}: {TO_LIBRARY}, every shape", ">=", bound, least))
    for name in ("sparsemax", "entmax15"):
        for case in sorted({case for case in times.case if case.startswith("encoder")}):
            ratio = times[TO_SOFTMAX][(times["transform"] == name) & (times.case == case)].max()
            rows.append((f"{name}: {TO_SOFTMAX}, {case}", "<=", 3, ratio))
    rows.append(("largest error of a weight", "<", 1e-6, errors[errors.index == "weights"].max()))
    rows.append(("relative error of the gradients of alpha", "<", 1e-4, errors[errors.index == "alpha gradient"].max()))
    if "step" in results.benchmark.values:
        steps = ratio_table(results, "step", "softmax")["time / softmax"].reset_index()
        for case, bound in {"decoder_cross": 1.05, "all sites": 1.3}.items():
            for name, ratio in steps[steps.case == case].set_index("transform")["time / softmax"].items():
                if name not in ("softmax", "tvmax"):
                    rows.append((f"step with {name} at {case} / softmax", "<=", bound, ratio))
    if "tvmax" in results.benchmark.values:
        loops = ratio_table(results, "tvmax", "detrlib")["time / detrlib"].droplevel(["case", "transform"])
        rows.append(("tvmax: loop as published / time", ">=", 50, loops["loop, as published"]))
        errors = results[(results.benchmark == "tvmax") & (results.quantity == "error")].set_index("source").value
        rows.append(("tvmax: largest error of a weight", "<", 1e-5, errors["detrlib"]))
    compare = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
    met = ["not measured" if np.isnan(x) else "yes" if compare[sign](x, bound) else "no" for _, sign, bound, x in rows]
    table = pd.DataFrame(rows, columns=["target", "sign", "bound", "measured"]).assign(met=met)
    table["wanted"] = [f"{sign} {bound:g}" for _, sign, bound, _ in rows]
    table["measured"] = ["–" if np.isnan(x) else f"{x:.3g}" for *_, x in rows]
    return table.set_index("target")[["wanted", "measured", "met"]]


def save_results(results: pd.DataFrame, folder: Path, known: dict) -> list[str]:
    """Write benchmarks.csv, tables.md with every table, both figures, and `known` as environment.json to `folder`.

    Args:
        results: rows of all that was measured.
        folder: made if it is not there.
        known: of the machine and the settings, as of `measure.environment`.

    Returns:
        The names of all files in the folder.
    """
    write_json(folder / "environment.json", known)
    results.to_csv(folder / "benchmarks.csv", index=False)
    tables = {
        "Transforms": transform_table(results).map(in_digits, na_action="ignore", decimals=2),
        "Errors": error_table(results),
        "TVMax": ratio_table(results, "tvmax", "detrlib").map(in_digits, decimals=3),
        "Training step": ratio_table(results, "step", "softmax").map(in_digits, decimals=3),
        "Targets": check_targets(results),
    }
    text = ""
    for title, table in tables.items():
        flat = table.reset_index().set_index(table.index.names[0])
        text += f"## {title}\n\n{markdown_table(flat, {}, unranked=flat.columns)}\n" if len(flat) else ""
    (folder / "tables.md").write_text(text)
    note = f"made by notebook 10_benchmarks on {known['processor']}, {known['device']}, {known['threads']} threads"
    save(transform_times(results[~results.case.str.endswith(KEPT)]), "transform_times", folder, note)
    save(step_ratios(results), "step_ratios", folder, note)
    return sorted(path.name for path in folder.iterdir())


@styled
def transform_times(results: pd.DataFrame) -> Figure:
    """Milliseconds of both passes (rows) at every shape (columns), a marker per source; lines are quartiles."""
    timed = results[(results.benchmark == "transform") & (results.unit == "s")]
    cases, names = timed.case.unique(), list(timed["transform"].unique())
    layout = {"nrows": len(PASSES), "ncols": len(cases), "squeeze": False, "sharex": "col", "sharey": True}
    drawn, panels = figure(1.0, 0.12 + 0.07 * len(names), **layout)
    colours = run_colours(names)
    for row, quantity in zip(panels, PASSES, strict=True):
        for axes, case in zip(row, cases, strict=True):
            for _, point in timed[(timed.case == case) & (timed.quantity == quantity)].iterrows():
                y, colour = names.index(point["transform"]), colours[point["transform"]]
                axes.plot([1000 * point.low, 1000 * point.high], [y, y], color=colour)
                axes.plot(1000 * point.value, y, **_marker(point.source, colour))
            axes.set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
            axes.grid(axis="x")
        row[0].set_ylabel(quantity)
    for top, bottom, case in zip(panels[0], panels[-1], cases, strict=True):
        top.set_title(case, loc="left")
        bottom.set_xlabel("milliseconds")
    sources = [source for source in MARKERS if source in timed.source.values]
    handles = [Line2D([], [], **_marker(source, MUTED)) for source in sources]
    names = [LIBRARIES.get(source, source) for source in sources]
    drawn.legend(handles, names, loc="outside upper right", ncols=len(sources))
    return drawn


def _marker(source: str, colour: str) -> dict:
    """Filled where it is ours, and below the others, which stay visible."""
    own = source == "detrlib"
    fill = {"markerfacecolor": colour if own else "white", "zorder": 3 if own else 4}
    return fill | {"marker": MARKERS[source], "color": colour, "linestyle": "", "markersize": 4.5}


@styled
def step_ratios(results: pd.DataFrame) -> Figure:
    """Time of a training step compared to softmax everywhere, a panel per case; whiskers are quartiles."""
    table = ratio_table(results, "step", "softmax").reset_index()
    cases = table.case.unique()
    drawn, panels = figure(1.0, 0.3, ncols=len(cases), squeeze=False, sharey=True)
    for axes, case in zip(panels[0], cases, strict=True):
        rows = table[table.case == case]
        heights, names = rows["time / softmax"].to_numpy(), list(rows["transform"])
        quartiles = rows[["quartile 1 [s]", "quartile 3 [s]"]].to_numpy().T / rows["median [s]"].iloc[0]
        whiskers = {"yerr": np.abs(quartiles - heights), "error_kw": {"elinewidth": 0.8}}
        bars = axes.bar(names, heights, 0.6, color=[run_colours(names)[name] for name in names], **whiskers)
        for bar, words in zip(bars, axes.bar_label(bars, fmt="%.2f", label_type="center"), strict=True):
            words.set_color(text_colour(bar.get_facecolor()))
        axes.axhline(1, color=MUTED, linewidth=0.6, zorder=0)
        axes.set_title(case, loc="left")
    panels[0][0].set_ylabel("time of a step / softmax")
    return drawn
