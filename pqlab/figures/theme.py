"""Colours, fonts and the two plotly templates (light and dark) that all figures share.

Everything that depends on the theme lives in the template: background, text, axes and grid are the template's. So a
figure changes its theme by changing `layout.template` alone. Where the theme follows the page (panels, HTML files) the
background is transparent; a plain figure brings its own, since a notebook shows it on a light page and on a dark one.
The colours of the data are the same in both themes and were chosen to be seen on white and on near-black: the Okabe-Ito
palette (Okabe and Ito 2008) for kinds, cividis (Nunez et al. 2018) for amounts. Neither needs colour vision; still, no
figure says a thing by colour alone.
"""

from __future__ import annotations

from typing import Literal, get_args

import plotly.graph_objects as go

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = get_args(Theme)

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"

SEQUENCES: tuple[str, ...] = (SKY, ORANGE, GREEN, PURPLE, YELLOW, VERMILLION, BLUE)
"""Colours of sequences (or of other kinds without an order), to be taken in turn: `sequence_colour`."""

EXACT, PAGED = BLUE, ORANGE
"""Standard exact attention, and the paged product-quantized one, wherever they stand side by side."""

REGIONS: dict[str, str] = {"sink": PURPLE, "code": ORANGE, "window": SKY}
"""The three parts of a row of the cache: exact sinks, codes in pages, exact residual window."""

FREE, WASTED = "rgba(140,140,140,0.25)", "rgba(140,140,140,0.55)"
GOOD, BAD = GREEN, VERMILLION

AMOUNTS = "Cividis"
"""The colour scale of amounts."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
FONT_SIZE = 13

_MARKS = ("circle", "square", "diamond", "x", "triangle-up")

_PAGE = {"light": "#ffffff", "dark": "#111111"}
_INK = {"light": "#24292f", "dark": "#d7dae0"}
_SOFT = {"light": "#57606a", "dark": "#a3a9b3"}
_GRID = {"light": "rgba(0,0,0,0.10)", "dark": "rgba(255,255,255,0.14)"}
_LINE = {"light": "rgba(0,0,0,0.35)", "dark": "rgba(255,255,255,0.40)"}
_RAISED = {"light": "#ffffff", "dark": "#2b2f36"}


def sequence_colour(index: int) -> str:
    """Colour of sequence `index`; they repeat after seven, so a figure also writes the number."""
    return SEQUENCES[index % len(SEQUENCES)]


def sequence_mark(index: int) -> str:
    """Shape of the marks of sequence `index`, so that colour does not tell it alone; they repeat after five."""
    return _MARKS[index % len(_MARKS)]


def template(theme: Theme = "light", *, opaque: bool = False) -> go.layout.Template:
    """The plotly template of a theme: readable text, Okabe-Ito colours in order.

    Args:
        opaque: a background of the theme's own, for a page that may have the other theme; else it is transparent.
    """
    if theme not in THEMES:
        raise ValueError(f'theme = {theme!r} is unknown; set "light" or "dark"')
    axis = {
        "gridcolor": _GRID[theme],
        "linecolor": _LINE[theme],
        "zerolinecolor": _LINE[theme],
        "tickcolor": _LINE[theme],
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": FONT_SIZE}},
        "tickfont": {"size": FONT_SIZE - 1, "color": _SOFT[theme]},
    }
    layout = {
        "paper_bgcolor": _PAGE[theme] if opaque else "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": FONT_SIZE, "color": _INK[theme]},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": FONT_SIZE + 2}},
        "colorway": list(SEQUENCES),
        "colorscale": {"sequential": AMOUNTS, "sequentialminus": AMOUNTS},
        "coloraxis": {"colorbar": {"outlinewidth": 0}},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {
            "bgcolor": _RAISED[theme],
            "bordercolor": _LINE[theme],
            "font": {"family": FONT, "size": FONT_SIZE, "color": _INK[theme]},
            "align": "left",
        },
        "legend": {"bgcolor": "rgba(0,0,0,0)", "orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _SOFT[theme], "activecolor": _INK[theme]},
        "margin": {"l": 56, "r": 16, "t": 44, "b": 48},
        "annotationdefaults": {"font": {"color": _INK[theme]}, "arrowcolor": _SOFT[theme]},
        "shapedefaults": {"line": {"color": _INK[theme]}},
        "hovermode": "closest",
        "bargap": 0.25,
    }
    bar = {
        "outlinewidth": 0,
        "thickness": 12,
        "tickfont": {"color": _SOFT[theme]},
        "title": {"side": "right", "font": {"size": FONT_SIZE}},
    }
    amounts = {"heatmap": [{"colorscale": AMOUNTS, "colorbar": bar}], "scatter": [{"marker": {"colorbar": bar}}]}
    return go.layout.Template(layout=layout, data=amounts)
