"""The paper's numbers, one constant for each table and figure that prints some; recipes show them beside their own.

Those of Table 2 are in `evals/paper.py`.
"""

from __future__ import annotations

# Fig. 3: points that non-negative tuning gains at most on ImageNet-100, by share of the labels, and of wrong labels,
# where the rate is not printed.
FEW_SHOT_GAINS: dict[float | None, float] = {0.1: 3.9}
NOISY_GAINS: dict[float | None, float] = {None: 11.9}

TABLE_1_RATES = tuple(i / 10 for i in range(10))  # shares of wrong training labels
TABLE_1 = {  # top-1 accuracy of linear probes in percent at these rates, by data set and features
    "CIFAR-100": {
        "poly": (54.5, 53.4, 52.8, 52.1, 51.2, 49.9, 49.5, 48.0, 45.0, 35.7),
        "sae": (54.4, 53.9, 53.4, 52.9, 51.9, 51.3, 50.5, 49.7, 47.1, 39.1),
        "ncl": (52.8, 53.9, 53.5, 52.6, 52.6, 52.3, 51.4, 49.5, 48.0, 44.9),
    },
    "ImageNet-100": {
        "poly": (66.8, 63.1, 61.8, 60.1, 58.8, 56.4, 54.9, 53.1, 48.9, 34.4),
        "sae": (66.2, 65.3, 62.3, 60.5, 59.8, 59.7, 58.5, 55.9, 54.3, 45.9),
        "ncl": (66.7, 65.4, 64.4, 63.9, 62.4, 62.3, 60.6, 59.8, 57.6, 48.1),
    },
}
