r"""Figures and tables for a thesis, kept in a folder, and a document of LaTeX that holds all of them.

FOLDER/
    <figure>.pdf .png     at its final size, see `style.save`
    <table>.tex .md       see `tables.save_table`
    <either>.txt          the runs and commits that it came from
    thesis.tex            two pages of what matters most, and everything else behind them; compiles as it is
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from detrlib.figures import style, tables
from detrlib.files import write_atomic
from detrlib.runs import folder as runs

DOCUMENT = "thesis.tex"
LEFT_OUT = "% nothing to show: "  # begins a line of it on each figure that had nothing
NAMED = dict.fromkeys("\\/:*?\"<>|#%{}~$&^' ", "-")  # in names of files, to LaTeX or to some file system

PREAMBLE = rf"""% Any class will do: \input the tables, and \includegraphics the figures, which are at their final size.
\documentclass[11pt,a4paper]{{article}}
\usepackage[textwidth={style.TEXT_WIDTH}in,textheight=9.7in]{{geometry}}
\usepackage{{iftex}}
\ifPDFTeX\usepackage[T1]{{fontenc}}\usepackage{{lmodern}}\else\usepackage{{fontspec}}\fi
% Letters that these fonts lack, as of other scripts, are printed by their numbers: [U+4E2D].
\makeatletter\def\UTFviii@undefined@err#1{{[\expandafter\numbered\string#1\relax]}}
\def\numbered#1:#2\relax{{\UTFviii@hexcodepoint{{\decode@UTFviii#2\relax}}}}\makeatother
\usepackage{{graphicx,booktabs,placeins}}
\usepackage[export]{{adjustbox}}  % wider or higher than a page: made smaller
\usepackage[font=small,skip=4pt]{{caption}}
\AddToHook{{env/table/begin}}{{\small\setlength{{\tabcolsep}}{{4pt}}}}
% Pages full of figures, in order, as many as there are.
\makeatletter\renewcommand{{\fps@figure}}{{!htbp}}\renewcommand{{\fps@table}}{{!htbp}}\makeatother
\renewcommand{{\topfraction}}{{1}}\renewcommand{{\bottomfraction}}{{1}}\renewcommand{{\textfraction}}{{0}}
\setcounter{{topnumber}}{{9}}\setcounter{{bottomnumber}}{{9}}\setcounter{{totalnumber}}{{9}}
\makeatletter\setlength{{\@fptop}}{{0pt}}\makeatother\extrafloats{{200}}\maxdeadcycles=1000
"""
FIGURE = r"""\begin{{figure}}
\centering
\includegraphics[max width=\linewidth,max totalheight=0.84\textheight]{{{name}.pdf}}
\caption{{{caption}}}
\label{{fig:{name}}}
\end{{figure}}
"""


class Thesis:
    """What a notebook keeps of its figures and tables in a folder, in the order in which it does.

    run_dirs: what is shown; first: labels, such as fig:layers or tab:main_table, of what the document begins with.
    """

    def __init__(self, run_dirs: Sequence[Path], folder: Path, first: Sequence[str] = ()):
        names = map(runs.run_name, run_dirs)
        command = shlex.join(["detrlib", "figures", *names, "--out", runs.within_project(folder)])
        self.note = runs.provenance(run_dirs, command)
        self.folder, self.first, self.runs = folder, first, list(runs.run_labels(run_dirs).values())
        self._kept, self._left_out = {}, {}  # by label: its environment in LaTeX; why there is none

    def figure(self, drawn: Figure, name: str, caption: str) -> Figure:
        """Write a figure as `style.save`, and return it; caption: text, in which no sign has a meaning to LaTeX."""
        name = name.translate(str.maketrans(NAMED))
        if drawn.get_label() == style.NOTHING:
            said = " ".join(drawn.axes[0].texts[0].get_text().split())
            self._left_out[f"fig:{name}"] = said.removeprefix("Nothing to show: ").rstrip(".")
            return drawn
        self._kept[f"fig:{name}"] = FIGURE.format(name=name, caption=tables.escaped(caption))
        return style.save(drawn, name, self.folder, self.note)

    def table(self, table: pd.DataFrame, name: str, caption: str, **ranking) -> Markdown:
        """Write a table as `tables.save_table`, and return it."""
        if table.empty:
            self._left_out[f"tab:{name}"] = "no rows"
        else:
            self._kept[f"tab:{name}"] = f"\\input{{{name}.tex}}\n"
        return tables.save_table(table, name, caption, self.folder, self.note, **ranking)

    def close(self) -> Markdown:
        """Write the document, and return where everything comes from, to be shown."""
        first = [self._kept[label] for label in self.first if label in self._kept]
        rest = [text for label, text in self._kept.items() if label not in self.first]
        commands = "".join(f"% {line}\n" for line in self.note.splitlines())
        reasons = dict.fromkeys(self._left_out.values())
        left_out = {why: ", ".join(label for label, own in self._left_out.items() if own == why) for why in reasons}
        body = [
            PREAMBLE,
            commands + "".join(f"{LEFT_OUT}{labels} ({why})\n" for why, labels in left_out.items()),
            "\\begin{document}\n\\section*{Results}\n",
            f"Runs: {tables.escaped(', '.join(self.runs))}. "
            "Every figure and table says in a file of its name, ending in .txt, which commit, device and settings it "
            "came from; the commands that repeat them stand in this file.\n",
            *first,
            "\\FloatBarrier\n\\clearpage\n\\appendix\n\\section{All other figures and tables}\n" if rest else "",
            *rest,
            "\\end{document}\n",
        ]
        write_atomic(self.folder / DOCUMENT, lambda file: file.write_text("\n".join(filter(None, body))))
        return Markdown(f"`{self.folder / DOCUMENT}`\n```\n{self.note}\n```")


def left_out(folder: Path) -> list[str]:
    """What had nothing to show in the document of a folder, and why, a line for each reason."""
    lines = (folder / DOCUMENT).read_text().splitlines()
    return [line.removeprefix(LEFT_OUT) for line in lines if line.startswith(LEFT_OUT)]
