"""One look for every figure: colours of transforms, sizes, panels, what is saved, and what is said where nothing is."""

import importlib
import subprocess
import sys
from pkgutil import iter_modules

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from seaborn.utils import relative_luminance

from detrlib import figures, teaching
from detrlib.config import PROJECT
from detrlib.figures import style

pytestmark = pytest.mark.filterwarnings("error")


def test_transforms_and_the_palette_are_distinct():
    assert len(set(style.COLOURS.values())) == len(style.COLOURS)
    assert len(set(style.PALETTE)) == len(style.PALETTE)
    assert set(style.PALETTE) - set(style.COLOURS.values()), "a run without a transform needs a colour of its own"


@pytest.mark.parametrize("name", style.COLOURS)
def test_a_transform_keeps_its_colour_whatever_runs_stand_beside_it(name):
    run = f"shapes_{name}_seed3"
    for runs in ([run], [run, "baseline"], ["baseline", "other", run], [*(f"x-{n}" for n in style.PALETTE), run]):
        assert style.run_colours(runs)[run] == style.COLOURS[name]


def test_runs_of_one_transform_get_different_colours():
    colours = style.run_colours(["softmax_a", "softmax_b", "plain"])
    assert len(set(colours.values())) == 3 and colours["softmax_a"] == style.COLOURS["softmax"]
    assert colours["plain"] not in style.COLOURS.values()
    assert len(style.run_colours([f"run{number}" for number in range(20)])) == 20
    study = [
        f"{name}-{site}" for name in ("softmax", "sparsemax", "entmax15") for site in ("all", "self", "cross", "x")
    ]
    found = set(style.run_colours(study).values())
    assert len(found) == 12 and style.PALETTE[7] not in found


def test_more_runs_than_a_figure_holds_are_drawn_in_parts():
    assert style.in_parts({"a": 1, "b": 2, "c": 3}, 2) == {"": {"a": 1, "b": 2}, "_2": {"c": 3}}
    assert style.in_parts({}, 2) == {"": {}}


def test_what_a_figure_shows_is_said_in_words_without_code():
    """To those who cannot see it; what the arguments are stands further below."""
    packages = (figures, teaching)
    modules = [importlib.import_module(f"{p.__name__}.{m.name}") for p in packages for m in iter_modules(p.__path__)]
    drawing = {draw for module in modules for draw in vars(module).values() if hasattr(draw, "__wrapped__")}
    drawing = [draw for draw in drawing if getattr(draw, "__annotations__", {}).get("return") is plt.Figure]
    assert len(drawing) > 40
    assert [style.subject_of(draw) for draw in drawing if set("`{}[]") & set(style.subject_of(draw))] == []


def test_panels_above_an_empty_place_keep_the_numbers_of_a_shared_axis():
    drawn, axes = style.panels(4, 3, 1.0, sharex=True)
    drawn.canvas.draw()
    assert [axis.xaxis.get_tick_params()["labelbottom"] for axis in axes] == [False, True, True, True]


def test_figures_are_as_wide_as_asked_and_styled_for_themselves_only():
    drawn, _ = style.figure(width=0.5, aspect=2)
    assert np.allclose(drawn.get_size_inches(), (0.5 * style.TEXT_WIDTH, style.TEXT_WIDTH))
    assert drawn.dpi == style.STYLE["figure.dpi"]


def test_save_writes_pdf_png_and_the_note(tmp_path):
    drawn, axes = style.figure()
    axes.set_title("readable text")
    assert style.save(drawn, "gini", tmp_path / "new", "runs: a, b") is drawn
    paths = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in paths] == ["gini.pdf", "gini.png", "gini.txt"]
    pdf, png, note = (path.read_bytes() for path in paths)
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, not outlines
    assert png.startswith(b"\x89PNG") and note == b"runs: a, b\n"
    figures.save(drawn, "gini", tmp_path / "again")
    assert (tmp_path / "again" / "gini.pdf").read_bytes() == pdf
    assert [path.name for path in sorted((tmp_path / "again").iterdir())] == ["gini.pdf", "gini.png"]


def test_relative_folders_start_at_the_project_root(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "RUNS", tmp_path / "papermill_runs")
    figures.save(style.figure()[0], "empty")
    assert (tmp_path / "papermill_runs" / "figures" / "empty.pdf").exists()


def test_what_the_user_has_set_wins():
    with plt.rc_context():
        plt.rcParams.update({"lines.linewidth": 4.0, "figure.dpi": 50})
        drawn, axes = style.figure()
        assert drawn.dpi == 50 and axes.plot([1, 2])[0].get_linewidth() == 4.0
        assert not axes.spines["right"].get_visible()
        plt.rcParams["font.size"] = 16
        assert style.figure()[1].title.get_fontsize() == 16  # twice as large, like all text
        with plt.rc_context(style.look()), plt.rc_context(style.look()):  # one drawing function calls another
            assert plt.rcParams["xtick.labelsize"] == 14 and plt.rcParams["font.size"] == 16


def test_figures_for_a_class_are_larger_on_the_screen():
    with plt.rc_context():
        style.use("class")
        large, _ = style.figure()
        style.use("page")
        small, _ = style.figure()
    assert large.dpi > 1.5 * small.dpi == 1.5 * style.STYLE["figure.dpi"]
    assert list(large.get_size_inches()) == list(small.get_size_inches())
    with pytest.raises(ValueError, match="page or class"):
        style.use("wall")


def test_drawing_functions_keep_what_the_user_has_set():
    @style.styled
    def draw():
        drawn, axes = style.figure()
        axes.plot([1, 2])
        return drawn

    with plt.rc_context({"lines.linewidth": 4.0}):
        assert draw().axes[0].lines[0].get_linewidth() == 4.0
    assert draw().axes[0].lines[0].get_linewidth() == style.STYLE["lines.linewidth"]


def test_panels_stand_in_rows_and_leave_no_empty_one():
    drawn, panels = style.panels(5, 3, height=1.5, width=0.5)
    assert len(drawn.axes) == len(panels) == 5
    assert np.allclose(drawn.get_size_inches(), (0.5 * style.TEXT_WIDTH, 2 * 1.5))
    assert style.panels(2, 3, height=1.0)[1][1].get_subplotspec().get_geometry()[:2] == (1, 2)


def test_panels_of_an_image_have_its_proportions():
    drawn, panels = style.image_panels(np.zeros((50, 100, 3)), rows=2, columns=2, widest=2.0, header=0.1)
    assert panels.shape == (2, 2)
    assert np.allclose(drawn.get_size_inches(), (4.0, 2 * (1.0 + style.CAPTION_HEIGHT) + 0.1))


def test_a_figure_of_nothing_says_why_and_is_not_saved(tmp_path, texts):
    @style.styled
    def draw():
        raise style.Nothing("no run has attention")

    drawn = draw()
    assert texts(drawn) == ["Nothing to show: no run has attention."]
    assert drawn.alternative() == "Nothing to show: no run has attention.", "and no picture that is not there"
    assert style.save(drawn, "layers", tmp_path, "note") is drawn and not list(tmp_path.iterdir())


def test_a_class_has_its_colour_whatever_else_is_shown():
    names = {3: "triangle", 1: "circle", 7: "star"}
    assert style.class_colour(3, names) == style.CLASS_COLOURS[1]
    assert len({style.class_colour(label, names) for label in names}) == 3
    assert style.class_colour(0, names) == style.MUTED  # no class
    many = dict.fromkeys(range(91), "class")
    assert style.class_colour(90, many) in style.CLASS_COLOURS


@pytest.mark.parametrize("colour", [*style.COLOURS.values(), *style.CLASS_COLOURS, *style.PALETTE])
def test_letters_on_white_are_dark_enough_to_be_read_and_change_no_more_than_needed(colour):
    def contrast(shade):
        return 1.05 / (0.05 + relative_luminance(shade))

    letters = style.readable(colour)
    assert contrast(letters) >= 4.45 and (contrast(letters) < 5.1 or letters == colour.lower())


def test_figures_come_with_their_folder_and_the_package_itself_stays_small():
    code = "import sys, detrlib; small = 'torch' not in sys.modules; from detrlib import figures; "
    code += "print(small, figures.attention.__name__, figures.save.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "detrlib.figures.attention", "save"], done.stderr


def names_drawn(*names):
    @style.styled
    def draw():
        drawn, axes = style.figure()
        axes.set_yticks(range(len(names)), names)
        axes.set_xscale("log")
        axes.set_title(names[0])
        axes.plot([1, 1000], [0, 1], label=names[-1])
        drawn.legend(loc="outside upper right")
        return drawn

    return draw()


def test_names_of_runs_are_no_formulas_but_numbers_at_an_axis_are(tmp_path):
    drawn = names_drawn(r"$\frac$", "a$b$c")  # the first is none that matplotlib can draw
    drawn.savefig(tmp_path / "names.png")
    (axes,) = drawn.axes
    assert not any(text.get_parse_math() for text in [axes.title, *axes.get_yticklabels()])
    assert not drawn.legends[0].get_texts()[0].get_parse_math()
    marks = [label for label in axes.get_xticklabels() if "mathdefault" in label.get_text()]
    assert marks and all(label.get_parse_math() for label in marks)


def test_characters_that_no_font_has_are_said_once(monkeypatch, caplog):
    monkeypatch.setattr(style, "MORE_FONTS", [])
    style._say_fonts.cache_clear()
    for _ in range(2):
        names_drawn("实验", "日本語の名前")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "Noto Sans CJK" in caplog.text
    monkeypatch.setattr(style, "MORE_FONTS", ["Noto Sans CJK SC"])
    style._say_fonts.cache_clear()
    names_drawn("实验")
    assert len(caplog.records) == 1


def test_a_figure_says_in_words_what_it_shows():
    """In notebooks and their pages, where IPython puts it beside the picture."""

    @style.styled
    def rising():
        """How AP [n] rises."""
        drawn, axes = style.figure(0.5)
        axes.plot([0, 1], label="softmax")
        axes.set_title("AP of\none run", loc="left")
        axes.set(xlabel="epoch")
        axes.legend()
        return drawn

    data, metadata = DisplayFormatter().format(rising())
    assert metadata["image/png"]["alt"] == "How AP rises. AP of one run; epoch; softmax"
    assert "image/png" not in data  # which the notebook's own formatter adds
