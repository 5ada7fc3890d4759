"""What tests of figures share."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """No figure stays in pyplot's register, and no setting outlives the call that made it."""
    before = dict(plt.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def texts(drawn: Figure) -> list[str]:
    """Every text of a figure once it is drawn, titles, labels and legends included."""
    drawn.canvas.draw()
    return [text.get_text() for text in drawn.findobj(lambda item: hasattr(item, "get_text")) if text.get_text()]
