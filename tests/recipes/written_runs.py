"""Runs of the recipes that are written and not measured, for tests of the page that shows them."""

import itertools

from vision_bench.probe import TRAINING
from vision_bench.runs import Run

ARMS = ("poly", "sae", "ncl", "poly_decay", "poly_unit", "random_relu", "random_mask")
MEASURED = ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions")
SEEDS = [0, 1]
QUALITY = [(quality, 0.1, {}) for quality in ("sae_fvu", "sae_l0", "sae_dead_share")]


def write(folder, recipe, config, rows, **facts):
    """A run of (metric, value, arm) for every seed; the second seed has 0.02 more."""
    run = Run(folder, recipe, {"seeds": SEEDS} | config, facts=facts)
    of = {"n": 360, "seconds": 1.0, "device": "cpu (1 threads)"}
    noise = [{"noise_seed": seed} for seed in SEEDS]
    run.replace(
        [
            run.row(m, v + 0.02 * s, seed=s, **of, **arm, **(noise[s] if arm.get("scale") else {}))
            for m, v, arm in rows
            for s in SEEDS
        ]
    )
    return folder


def decay(name):
    return {"features": name, "probe_weight_decay": 0.1 if name == "poly_decay" else 0.0}


def probed(metric="offline_probe_top1", **axes):
    """Rows of probes and of what the features are; NCL is 0.1 above poly, and each cell 0.01 below the one before."""
    start = {name: 0.6 + 0.1 * (name == "ncl") for name in ARMS}
    cells = list(itertools.product(*axes.values()))
    rows = [
        (
            metric,
            start[name] - 0.01 * i,
            decay(name) | dict(zip(axes, cell, strict=True)),
        )
        for name in ARMS
        for i, cell in enumerate(cells)
    ]
    trained = {name: values for name, values in axes.items() if name in ("noise_rate", "loss")}
    for name, cell, one in itertools.product(ARMS, itertools.product(*trained.values()), TRAINING):
        rows.append((one, 0.3, decay(name) | dict(zip(trained, cell, strict=True))))
    rows.append(("chance_top1", 0.1, {}))
    rows += [("chance_top1", 0.1, {"shift": shift}) for shift in axes.get("shift", ())]
    rows += [(measured, 0.2, {"features": name}) for measured in MEASURED for name in ARMS]
    return [*rows, *QUALITY]


def label_noise(folder, rates=(0.0, 0.5, 0.8), **config):
    known = {"data": "digits", "backbone": "small_conv", "noise_rates": list(rates), "decays": [0.1]} | config
    return write(folder, "label_noise_probing", known, probed(noise_rate=rates), num_classes=10)


def shifted(folder, **facts):
    """Of two shifts, and of two corruptions at all severities."""
    rows = probed(shift=["none", "rotated", "sketch"])
    for name, corruption, severity in itertools.product(ARMS, ("fog", "snow"), range(1, 6)):
        arm = decay(name) | {"shift": "c", "extra": False}
        rows.append(("offline_probe_top1", 0.5, arm | {"corruption": corruption, "severity": severity}))
    rows.append(("chance_top1", 0.1, {"shift": "c"}))
    shifts = {"rotated": "1", "sketch": "2", "c": "3"}
    known = {"data": "digits", "decays": [0.1], "class_map": None, "shifts": shifts}
    return write(folder, "ood_probing", known, rows, **facts)


def salient(folder, **config):
    rows = [("offline_probe_top1", 0.5, {"features": name}) for name in ARMS[:3]]
    rows += [(metric, 0.3, {"features": name}) for metric in (*MEASURED, *TRAINING) for name in ARMS[:3]]
    rows.append(("chance_top1", 0.1, {}))
    of_group = {"low": 0.1, "high": 0.4, "histogram": [0.0, 0.5, 0.5]}
    for name in ARMS[:3]:
        rows.append(("salient_difference", 0.1, {"features": name, "low": 0.05, "high": 0.2}))
        rows.append(("salient_difference_within_class", 0.05, {"features": name}))
        for group in ("right", "wrong"):
            rows.append(("salient_consistency", 0.3, {"features": name, "group": group} | of_group))
            rows.append(("salient_chance", 0.1, {"features": name, "group": group}))
    return write(folder, "salient_features", {"noise_rate": 0.8, "data": "digits"} | config, [*rows, *QUALITY])
