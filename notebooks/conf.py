"""The course as pages: `make course` executes notebooks 01 to 05 and has Sphinx, with MyST-NB, make a site of them.

Nothing in it asks the network: formulas become MathML, which browsers draw themselves, and search is a script.
"""

import json
import re

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

project = "Sparse attention in detection transformers"
html_title, html_theme = project, "furo"
extensions = ["myst_nb"]
exclude_patterns = ["html", "jupyter_execute"]  # what is made of the pages stands beside them
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they are executed already, as any other notebook of the project
nb_merge_streams = True
html_copy_source = html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"
# Lines of code are 120 letters long; a table of numbers needs no lines between its cells.
LOOK = """
html body { --code-font-size: 0.75em; }
@media (min-width: 80em) { html .content { width: 56em; } }
html div.math { overflow-y: hidden; padding: 0.3em 0; }
html table.dataframe { display: block; overflow-x: auto; border: 0; border-collapse: collapse; font-size: 0.875em; }
html table.dataframe :is(th, td) { border: 0; padding: 0.2em 0.7em; text-align: right; }
html table.dataframe thead tr:last-child th { border-bottom: 1px solid var(--color-foreground-border); }
"""
# TeX that docutils does not know or reads otherwise, and what it draws the same with: sizes of brackets, two digits of
# a fraction, what stands below a name, brackets that are as high as what they hold, and the space around a logarithm.
TEX = {
    r"\\[bB]igg?[lr]?(?![a-zA-Z])": "",
    r"\\dots(?![a-zA-Z])": r"\\ldots",
    r"\\([td]?frac)(\d)(\d)": r"\\\1{\2}{\3}",
    r"\\operatorname\*\{(\w+)\}_\{([^{}]*)\}": r"\\underset{\2}{\\operatorname{\1}}",
    r"\\(lvert|lVert|langle)": r"\\left\\\1",
    r"\\(rvert|rVert|rangle)": r"\\right\\\1",
    r"(?<=[\w})])\s*\\log(?![a-zA-Z])": r"\\,\\log",
    r"\\log\s+(?=[\w\\])": r"\\log\\,",
}
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("source-read", describe_pictures)
    app.connect("html-page-context", finish)


def inline_formula(writer, node):
    writer.body.append(mathml(node, block=False))
    raise SkipNode


def displayed_formula(writer, node):
    """Wider than a phone's screen, it scrolls by itself, and keys have to get there."""
    formula = mathml(node, block=True)
    writer.body.append(f'<div class="math" tabindex="0" role="group" aria-label="formula">{formula}</div>')
    raise SkipNode


def mathml(node, block):
    """The formula of a node; what is no TeX that can be drawn stops the site, in place of a page that shows TeX."""
    tex = node.astext()
    for pattern, known in TEX.items():
        tex = re.sub(pattern, known, tex)
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        raise ExtensionError(f"{node.source}: formula {tex}: {error}") from None


def describe_pictures(app, docname, source):
    """Alternative texts of figures stand with their outputs; MyST-NB takes them from the cell."""
    if app.env.doc2path(docname).suffix != ".ipynb":
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        described = (output.get("metadata", {}).get("image/png", {}) for output in cell.get("outputs", []))
        texts = [one["alt"] for one in described if "alt" in one]
        if texts:
            cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(texts)}}
    source[0] = json.dumps(notebook)


def finish(app, pagename, templatename, context, doctree):
    """LOOK on every page, and code and tables wider than the screen within reach of the keyboard, to be scrolled."""
    context["metatags"] = context.get("metatags", "") + f"<style>{LOOK}</style>"
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    context["body"] = body.replace('class="dataframe"', 'class="dataframe" tabindex="0"')
