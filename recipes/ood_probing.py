"""Fig. 2(c): which features bear a shift of the distribution?

    python recipes/ood_probing.py --output_dir runs/ood
    accelerate launch recipes/ood_probing.py --config recipes/configs/imagenet100.yaml --data_root /data/imagenet \\
        --shifts sketch=/data/sketch stylized=/data/stylized/val --output_dir runs/figure2c
    accelerate launch recipes/ood_probing.py --config recipes/configs/cifar100.yaml --data cifar10 \\
        --shifts cifar_c=/data/CIFAR-10-C cifar10.1=/data/cifar10.1_v6_data.npy --output_dir runs/cifar10

Linear classifiers on frozen features, trained on the images of a set, tested on images of another distribution with
the same classes. The features and the controls are those of vision_bench/kinds.py, and `poly_decay`, which is poly
probed with the weight decay that is best for the shift. A shift is

- rotated, inverted or thinned: a synthetic shift of the test images, see vision_bench/shifts.py; the default;
- NAME=FOLDER with a folder of images for each class, of which those of the training set are taken;
- NAME=FOLDER@SPLIT or NAME=NAME_ON_THE_HUB@SPLIT: another data set that vision_bench.data reads (split: test);
- NAME=FOLDER of CIFAR-10-C or CIFAR-100-C, CORRUPTION.npy and labels.npy: all corruptions and severities;
- NAME=FILE_data.npy with FILE_labels.npy beside it, as CIFAR-10.1.

Where classes have other names, `--class_map FILE` is YAML: for the name of a shift, the class of the training set by
the class of the shift.

The paper (a picture only, ImageNet-Sketch and -Stylized): sae and ncl are ahead of poly. The default run, about two
minutes on 2 cores, is of synthetic shifts of 8 x 8 digits: it shows that the measurement works, not what the paper's
sets would say. Expected there: sae and ncl about 4 points over poly on rotated digits, 3 and 4 without a shift; all at
chance on inverted ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from experiments import CannotShow
from probe_report import draw_gain_parts, notes, probe_table
from probing import FEATURES, ControlSettings, LearnerSettings, controlled_grid, experiment, measure
from vision import PretrainingSettings, ProbingSettings, begin, finish, load_splits

from vision_bench import figures
from vision_bench.corruptions import shift_names
from vision_bench.data import ImageSet, warnings_in_one_line
from vision_bench.report import ProbeTable
from vision_bench.runs import Interval, Run, markdown_table, option, over_seeds, parse, run_as_program
from vision_bench.shifts import (
    DATA_ENDING,
    EXTRA_CORRUPTIONS,
    LABELS,
    SEVERITIES,
    Corruptions,
    load_arrays,
    load_corruptions,
    load_shifted,
    synthetic,
)
from vision_bench.sweep import ACCURACY, Grid, Test

CLEAN = "none"  # name of the test images without a shift


@dataclass
class OodSettings:
    """The shifts."""

    shifts: list[str] = option(["rotated", "inverted", "thinned"], help=f"NAME=PLACE, or {', '.join(shift_names())}.")
    class_map: str | None = option(None, help="YAML file: NAME of a shift: {its class: class of the training set}.")

    def __post_init__(self) -> None:
        for shift in self.shifts:
            name, sign, place = shift.partition("=")
            named = re.fullmatch(r"[\w.-]+", name) and place if sign else shift in shift_names()
            if not named:
                raise ValueError(
                    f"shifts has {shift!r}; each is NAME=PLACE, with a name of letters, digits, '_', '.' and '-', or "
                    f"one of {', '.join(shift_names())}."
                )
        names = list(self.places())
        if not names or len(names) < len(self.shifts) or CLEAN in names:
            raise ValueError(f"shifts takes different names other than {CLEAN!r}, got {names}.")

    def places(self) -> dict[str, str]:
        """The folder of each shift by its name, empty for a synthetic one."""
        return {name: place for name, _, place in (shift.partition("=") for shift in self.shifts)}

    def maps(self) -> Mapping[str, Mapping[str, str]]:
        """The classes of the training set by those of a shift, for the shifts of the file `class_map`."""
        if self.class_map is None:
            return {}
        try:
            maps = yaml.safe_load(Path(self.class_map).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"class_map is {self.class_map!r}, which cannot be read ({error}).") from None
        if not isinstance(maps, dict) or not all(isinstance(classes, dict) for classes in maps.values()):
            raise ValueError(f"class_map: {self.class_map} must have, for the name of a shift, class: class.")
        places = self.places()
        unfit = [name for name in maps if not places.get(name)]
        if unfit:
            raise ValueError(
                f"class_map: {self.class_map} has the shifts {', '.join(map(str, unfit))}; with classes to be matched "
                f"there are {', '.join(name for name, place in places.items() if place) or 'none'}."
            )
        # YAML reads a class that is called 1 as a number.
        return {name: {str(k): str(v) for k, v in classes.items()} for name, classes in maps.items()}


SETTINGS = (PretrainingSettings, ProbingSettings, ControlSettings, LearnerSettings, OodSettings)


def load_shifts(
    pretraining: PretrainingSettings, settings: OodSettings, splits: Mapping[str, ImageSet]
) -> dict[str, ImageSet | Corruptions]:
    """The images of every shift by its name; all that can be wrong with them is found here."""
    maps, train = settings.maps(), splits["train"]
    shifts: dict[str, ImageSet | Corruptions] = {}
    for name, place in settings.places().items():
        is_array = (Path(place) / LABELS).is_file() or place.endswith(DATA_ENDING)
        if is_array and name in maps:
            raise ValueError(f"class_map has {name}, but arrays have no names of classes to be matched.")
        if not place:
            shifts[name] = synthetic(name, splits["test"])
        elif place.endswith(DATA_ENDING):
            shifts[name] = load_arrays(place, train)
        elif is_array:
            shifts[name] = load_corruptions(place, train, progress=True)
        else:
            place, _, split = (place, "", "") if Path(place).exists() else place.partition("@")
            shifts[name] = load_shifted(
                place,
                train,
                split or None,
                maps.get(name),
                skip_corrupt=pretraining.skip_corrupt,
                label_column=pretraining.label_column,
                memory_limit=int(pretraining.memory_gib * 2**30),
                progress=True,
            )
    return shifts


def test_arms(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What distinguishes the rows of each test, by its name: of CIFAR-C each corruption and severity by itself."""
    arms: dict[str, dict[str, Any]] = {CLEAN: {"shift": CLEAN}}
    for shift in config["shifts"]:
        for corruption in config["corruptions"].get(shift, ()):
            for severity in range(1, SEVERITIES + 1):
                arm = {"corruption": corruption, "severity": severity, "extra": corruption in EXTRA_CORRUPTIONS}
                arms[f"{shift}/{corruption}/{severity}"] = {"shift": shift, **arm}
        if shift not in config["corruptions"]:
            arms[shift] = {"shift": shift}
    return arms


def grid(config: dict[str, Any], model_seed: int) -> Grid:
    """The probes with the models of a pretraining, tested on the images as they are and on those of every shift."""
    arms = test_arms(config)
    tests = [Test(name) for name in arms]
    return controlled_grid(config, model_seed, tests, test_arm=lambda test: arms[test.images])


def table_of(run: Run) -> ProbeTable:
    """The accuracies, a column for each shift, and of CIFAR-C for each corruption and for each severity too.

    Raises:
        CannotShow: rows are of corruptions that the configuration does not name, so that some may be missing.
    """
    config, columns = run.config, dict[Hashable, dict[str, Any]]()
    for name in (CLEAN, *config["shifts"]):
        corruptions = config["corruptions"].get(name, ())
        if not corruptions and any("corruption" in row["config"] for row in run.find(ACCURACY, shift=name)):
            raise CannotShow(
                f"the settings of this run do not say which corruptions of {name} there were, so whether all have "
                "rows is not known: they are of an older version of recipes/ood_probing.py; run it again."
            )
        # Additional corruptions do not count, unless there are no others.
        counted = {"extra": False} if set(corruptions) - set(EXTRA_CORRUPTIONS) else {}
        columns[name] = {"shift": name, **counted}
        columns |= {(name, corruption): {"shift": name, "corruption": corruption} for corruption in corruptions}
        if corruptions:
            severities = range(1, SEVERITIES + 1)
            columns |= {(name, severity): {**columns[name], "severity": severity} for severity in severities}
    return probe_table(run, columns)


def corruption_table(table: ProbeTable, shift: str, corruptions: list[str]) -> str:
    """Error by corruption, mean over the severities, and the mean corruption error, as Markdown."""
    lines = []
    for arm in table.arms:
        errors = [table.mean(arm, (shift, corruption)) for corruption in corruptions]
        lines.append(
            [
                arm,
                over_seeds(100 - table.points(arm, shift)).text(1),
                relative_error(table, arm, shift, corruptions).text(1),
                *(error._replace(mean=100 - error.mean).text(1) for error in errors),
            ]
        )
    header = ["features", "mean corruption error, %", "relative to poly, %", *corruptions]
    return (
        f"\n## {shift}: error in %, mean over the {SEVERITIES} severities\n\n{markdown_table(header, lines)}"
        "\nThe mean corruption error is the mean over corruptions, without the additional ones "
        f"({', '.join(EXTRA_CORRUPTIONS)}).\nRelative: each corruption's error divided by that of poly before the "
        "mean is taken, as Hendrycks and Dietterich (2019) do with AlexNet's.\n"
    )


def relative_error(table: ProbeTable, arm: str, shift: str, corruptions: list[str]) -> Interval:
    """Mean over the corruptions of the error relative to poly's, in percent; NaN where poly makes no error."""
    counted = [name for name in corruptions if name not in EXTRA_CORRUPTIONS] or corruptions
    ours, theirs = (
        pd.DataFrame({name: 100 - table.points(features, (shift, name)) for name in counted})
        for features in (arm, "poly")
    )
    by_seed = (100 * ours / theirs.where(theirs != 0)).mean(axis=1, skipna=False)
    return over_seeds(by_seed) if by_seed.notna().all() else Interval(math.nan, math.nan, len(by_seed))


def report(run: Run) -> str:
    """Accuracies with intervals, what the features are, gains and how they change from the clean images."""
    config, table = run.config, table_of(run)
    shifts = list(config["shifts"])
    columns = [CLEAN, *shifts]
    text = (
        f"# Linear probes on frozen features under a shift: {config['data']}, {config['backbone']}\n\n"
        "Top-1 accuracy, %, by the shift of the test images; probes of the images as they are.\n\n"
        f"{table.accuracy_table(columns, columns)}{table.training_table(['own training labels'], [CLEAN])}"
        f"\n## Points gained over poly, paired by seed\n\n{table.gain_table(columns, columns)}"
        "\n## By how much that gain is larger than without a shift, paired by seed\n\n"
        + table.growth_table(shifts, shifts, [CLEAN] * len(shifts))
    )
    for name, corruptions in config["corruptions"].items():
        text += corruption_table(table, name, corruptions)
    if made := [name for name in shifts if name in config.get("synthetic", shift_names())]:
        text += f"\nSynthetic shifts, made from the test images: {', '.join(made)}.\n"
    text += notes(run, table, columns)
    return text + "The paper shows Fig. 2(c) as a picture only (ImageNet-100): no numbers of it stand beside ours.\n"


def draw(run: Run) -> None:
    """Fig. 2(c), and for CIFAR-C the curves over the severities."""
    config, table = run.config, table_of(run)
    bars = table.bars({"no shift": CLEAN, **{name: name for name in config["shifts"]}}, FEATURES)
    figures.save(run.folder / "figure_2c", figures.accuracy_bars(*bars))
    draw_gain_parts(run, table, [CLEAN, *config["shifts"]])
    for name in config["corruptions"]:
        columns: list[Hashable] = [CLEAN, *((name, severity) for severity in range(1, SEVERITIES + 1))]
        chance = [table.chance(column) for column in columns]
        levels = range(SEVERITIES + 1)
        drawing = figures.band_curves(levels, table.curves(columns), "severity of the corruptions", chance)
        figures.save(run.folder / f"severities_{name}", drawing)


EXPERIMENT = experiment(
    SETTINGS,
    grid,
    recipe="ood_probing",
    items=("figure_2c",),
    title="Figure 2(c): distribution shifts",
    claim="The paper: SAE and NCL are ahead on ImageNet-Sketch and ImageNet-Stylized (ImageNet-100; bars without "
    "numbers).",
    pictures={
        "figure_2c": "Figure 2(c): ours",
        "gain_parts": "What the gains over poly consist of: ours",
        "severities_*": "Accuracy by severity of the corruptions of {}: ours",
    },
    report=report,
    draw=draw,
    recorded={"corruptions": {}},
)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    settings = parse(SETTINGS, arguments)
    pretraining, probing, *_, ood = settings
    splits = load_splits(pretraining)
    probing.check(pretraining, splits)  # before the images of the shifts, which may take long to read
    with warnings_in_one_line():
        shifts = load_shifts(pretraining, ood, splits)
    # The images of the shifts decide the results, not where they are.
    config = {"shifts": {name: images.fingerprint for name, images in shifts.items()}, "class_map": None}
    corruptions = {name: images.files for name, images in shifts.items() if isinstance(images, Corruptions)}
    facts = {
        "corruptions": {name: list(files) for name, files in corruptions.items()},
        "synthetic": [name for name, place in ood.places().items() if not place],
    }
    accelerator, run = begin("ood_probing", settings, splits, config, facts)

    def images_of(test: Test) -> ImageSet:
        name, *place = test.images.split("/")
        images = splits["test"] if name == CLEAN else shifts[name]
        return images.load(place[0], int(place[1])) if isinstance(images, Corruptions) else images

    measure(run, settings, splits, accelerator, grid, images=images_of)
    finish(accelerator, run, report, draw)


if __name__ == "__main__":
    run_as_program(main)
