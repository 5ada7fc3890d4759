"""What a benchmark in several parts has measured: rows on a disk as soon as they are there, a table of each part.

A row is a dictionary from the heading of a column to its value; one with the column "fault" says what could not be
measured, and why.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from detrlib.files import write_atomic, write_json


def fault(error: BaseException) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def append(path: Path, part: str, row: dict) -> None:
    """Add a row of a part to a file, a line of JSON each."""
    with path.open("a") as file:
        file.write(json.dumps({"part": part} | row) + "\n")


def read(path: Path, part: str) -> list[dict]:
    """The rows of a part in the order in which they were measured."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut short
    return [{name: value for name, value in row.items() if name != "part"} for row in rows if row["part"] == part]


def table(rows: list[dict]) -> str:
    """Rows in Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object) -> str:
    """A number to three digits, a missing value as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "–" if value is None else str(value).replace("|", "/")


def write(out: Path, name: str, known: dict, parts: Iterable[dict]) -> None:
    """<name>.json and <name>.md in a folder: what is known of the machine, and parts: "part", "seconds", "rows"."""
    parts = list(parts)
    write_json(out / f"{name}.json", {"environment": known, "parts": parts})
    heading = ", ".join(f"{key}: {value}" for key, value in known.items())
    texts = [f"## {part['part']} ({part['seconds']:.0f} s)\n\n{table(part['rows'])}" for part in parts]
    write_atomic(out / f"{name}.md", lambda path: path.write_text("\n".join([heading + "\n", *texts])))
