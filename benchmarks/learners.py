"""How long does each learner take for one set of labels, and how long would it for 50,000 x 2,048?

    python benchmarks/learners.py --samples 5000 --dimensions 256

Features are Gaussian classes with a share of wrong labels. The extrapolation is in proportion to the number of values,
which is too little for trees, that sort (log n), and for the covariance of `l1` and `k_sparse`, that is quadratic in
the dimensions but shared by all label sets. The last line is scikit-learn's solver of `l1` for ten passes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from measuring import machine, options_of, seconds
from sklearn.linear_model import LogisticRegression

from vision_bench.corruptions import flip_labels
from vision_bench.learners import LEARNERS, Task
from vision_bench.runs import markdown_table

WHOLE = 50_000 * 2_048


def main() -> None:
    """Time the learners once each, in seconds of the processor."""
    parser = options_of(__doc__)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels")
    parser.add_argument("--epochs", type=int, default=50, help="of linear probes")
    parser.add_argument("--learners", nargs="*", default=[*LEARNERS])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(options.classes, (options.samples,), generator=generator)
    centres = torch.randn(options.classes, options.dimensions, generator=generator) / 2
    features = torch.randn(options.samples, options.dimensions, generator=generator) + centres[labels]
    noisy = flip_labels(labels, options.noise, options.classes, generator)
    task = Task(features, noisy[None], options.classes, probe={"epochs": options.epochs})

    def passes_of_scikit_learn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ten passes do not converge
            LogisticRegression(penalty="l1", solver="saga", C=0.1, max_iter=10).fit(features.numpy(), noisy.numpy())

    arms: dict[str, Callable[[], object]] = {name: partial(LEARNERS[name].fit, task) for name in options.learners}
    arms["ten passes of scikit-learn's l1"] = passes_of_scikit_learn
    lines = []
    for name, arm in arms.items():
        taken = seconds(arm, time.process_time)
        lines.append([name, f"{taken:.2f}", f"{taken * WHOLE / features.numel():.0f}"])
    print(
        f"{machine('scikit-learn')}, {time.strftime('%Y-%m-%d')}; {tuple(features.shape)}, {options.classes} classes\n"
    )
    print(markdown_table(["learner", "seconds", "in proportion for 50,000 x 2,048"], lines))


if __name__ == "__main__":
    main()
