"""What a table of probes must say about its own numbers, in words; nothing where there is nothing to be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

UNEXPLAINED = 0.5  # share of the variance above which an autoencoder leaves out more than it keeps
TRAINING_NOTE = (
    "Own training labels: accuracy on the labels, wrong ones included, that the probes were trained on. Chance\n"
    "level: of a guess, or of the most frequent class where that is more.\n"
)


def untrained(cells: Sequence[str]) -> str:
    """A warning of cells of a table whose probes fit their own labels less often than class means do."""
    if not cells:
        return ""
    return (
        "\n**Warning: not trained.** These probes fit the labels that they were trained on less often than the\n"
        "nearest class mean by the same labels, a linear classifier without training. Their accuracy, and gains of\n"
        "them or over them, say how far a probe came, not what the features bear: give the probes more epochs, or\n"
        "another learning rate.\n\n" + "".join(f"- {cell}\n" for cell in cells)
    )


def unexplained(shares: Mapping[str, float | None]) -> str:
    """A warning of autoencoders, by name, whose share of the variance unexplained is too large or undefined."""
    numbers = {name: math.nan if share is None else share for name, share in shares.items()}
    poor = [f"{name} ({share:.2f})" for name, share in numbers.items() if not share <= UNEXPLAINED]
    if not poor:
        return ""
    return (
        f"\n**Warning: variance unexplained above {UNEXPLAINED:g}:** {', '.join(poor)}. These latents do not\n"
        "represent the features that they are made of: what sae gains or loses says nothing about making these\n"
        "monosemantic. Train the autoencoder longer, or with more active latents.\n"
    )
