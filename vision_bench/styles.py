"""How the arms of a figure look: colours, lines, hatches and markers that tell them apart."""

from __future__ import annotations

import colorsys
from typing import Any, NamedTuple


class Style(NamedTuple):
    """What tells an arm apart; in black and white prints the line, the hatch or the marker does."""

    colour: Any
    line: Any = "-"
    hatch: str = ""
    marker: str = "o"


MONO, POLY = Style("#0072B2"), Style("#D55E00", "--", "////")
# The colours are Okabe and Ito's, which colour-blind readers can tell apart.
_STYLES = {
    **dict.fromkeys(("mono", "ncl", "nce"), MONO),
    **dict.fromkeys(("poly", "ce"), POLY),
    "sae": Style("#009E73", marker="^"),
    "poly_decay": Style("#E69F00", ":", "...."),
    "poly_unit": Style("#000000", (0, (1, 1)), "----"),
    "random_relu": Style("#CC79A7", "-.", "\\\\\\\\"),
    "random_mask": Style("#999999", (0, (4, 1, 1, 1, 1, 1)), "xxxx"),
    "raw": Style("#D55E00"),
    "unit": Style("#000000", marker="D"),
    "relu": Style("#0072B2", marker="s"),
    "gain over raw": Style("#000000", marker="D"),
    "scale": Style("#E69F00", marker="s"),
    "tuning": Style("#CC79A7", marker="v"),
    "kernel": Style("#0072B2"),
    "basis": Style("#009E73", marker="^"),
    "ce+weight_decay": Style("#E69F00", ":"),
    "ce+dropout": Style("#000000", (0, (1, 1))),
    "ce+early_stopping": Style("#CC79A7", "-."),
    "lora": Style("#999999", (0, (4, 1, 1, 1, 1, 1))),
    "monolora": Style("#009E73"),
}


def style_of(arm: str) -> Style:
    """The style of an arm; one that is not listed gets a colour of its own, which it keeps."""
    if arm not in _STYLES:
        place = len(_STYLES)
        hue = 0.618034 * place % 1  # the golden ratio keeps any number of hues apart
        line, hatch, marker = ("-.", "-", "--", ":")[place % 4], 4 * "+o*"[place % 3], "vP*X"[place % 4]
        _STYLES[arm] = Style(colorsys.hsv_to_rgb(hue, 0.8, 0.6), line, hatch, marker)
    return _STYLES[arm]
