"""Drawings: that nothing is cut off, and that what is asked for is drawn."""

import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from vision_bench import figures


def cut_off(figure):
    """The texts that reach beyond the picture."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches() * figure.dpi
    texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, *ax.get_yticklabels())]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = {text.get_text(): text.get_window_extent() for text in texts if text.get_text()}
    return [text for text, box in boxes.items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


def panels(models, conditions, kinds=("raw", "unit", "relu", "sae")):
    return {m: {kind: dict.fromkeys(conditions, (50.0, 2.0, 10.0)) for kind in kinds} for m in models}


@pytest.mark.parametrize(
    "models",
    [
        ["resnet18"],
        [
            "hf-hub:timm/vit_base_patch16_clip_224.laion2b_ft_in12k_in1k_of_a_very_long_name output (random)",
            "resnet18",
        ],
        ["a" * 300],
    ],
)
def test_names_of_models_and_conditions_are_whole(models):
    conditions = ["clean", "80 % wrong labels", "folder /data/of/sketches_and_paintings_of_the_very_same_classes"]
    figure = figures.robustness_dots(panels(models, conditions), "tree")
    assert cut_off(figure) == []
    assert figure.axes[-1].get_xlabel() == "test accuracy of tree, %"
    assert [ax.get_title().replace("\n", "") for ax in figure.axes] == models
    names = [label.get_text().replace("\n", "") for label in figure.axes[0].get_yticklabels()]
    assert names == ["clean", "80 % wrong labels", "sketches_and_paintings_of_the_very_same_classes"]


def test_names_are_broken_between_their_words():
    name = "run_simclr_with_a_very_long_name_of_a_run_0"
    (ax,) = figures.robustness_dots(panels([name], ["clean"]), "tree").axes
    assert ax.get_title() == "run_simclr_with_a_very_long_\nname_of_a_run_0"


def test_two_folders_of_one_name_are_told_apart():
    conditions = ["clean", "folder /data/a/test", "folder /data/b/test"]
    (ax,) = figures.robustness_dots(panels(["resnet18"], conditions), "tree").axes
    assert [label.get_text().replace("\n", "") for label in ax.get_yticklabels()] == conditions


def test_the_legend_names_the_kinds_of_all_models_and_the_chance_level():
    both = panels(["resnet18"], ["clean"], ["raw", "sae"]) | panels(["vit"], ["clean"])
    (legend,) = figures.robustness_dots(both, "tree").legends
    assert {text.get_text() for text in legend.get_texts()} == {"raw", "unit", "relu", "sae", "chance level"}


ARMS = ["poly", "ncl", "a new kind", "another", *(f"kind {i}" for i in range(20))]


def colours(figure):
    """By the name in the legend, the colour as an RGB tuple."""
    (legend,) = figure.legends
    handles = [(handle.get_children() or [handle])[0] for handle in legend.legend_handles]
    found = {}
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        colour = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
        found[text.get_text()] = to_hex(colour)
    return found


@pytest.mark.parametrize(
    "draw",
    [
        lambda arms: figures.band_curves(
            [0, 1], {"accuracy": {arm: ([1, 2], [0, 0]) for arm in arms}}, "noise", [10, 10]
        ),
        lambda arms: figures.band_curves([0, 1], {"accuracy": {arm: ([1, 2], [0, 0]) for arm in arms}}, "epoch"),
        lambda arms: figures.accuracy_bars({"clean": dict.fromkeys(arms, (50.0, 1.0))}),
        lambda arms: figures.loss_curves([0, 1], {(arm, "ce"): ([1, 2], [0, 0]) for arm in arms}, 10.0),
        lambda arms: figures.robustness_dots(panels(["resnet18"], ["clean"], arms), "tree"),
    ],
)
def test_an_arm_that_is_not_listed_has_a_colour_of_its_own(draw):
    found, again = colours(draw(ARMS)), colours(draw(ARMS))
    assert found == again
    found.pop("chance level", None)
    assert len(set(found.values())) == len(found) == len(ARMS)


def test_gains_of_an_arm_that_is_not_listed_are_drawn():
    (ax,) = figures.gains_beside_paper([0, 1], {"a new kind": ([1, 2], [0, 0])}, {}, "noise").axes
    assert ax.get_title() == "a new kind"


def test_a_note_stands_in_the_legend_and_undefined_means_leave_a_gap():
    curves = {"ce": ([50.0, 60.0], [1.0, 1.0]), "nce": ([math.nan, 61.0], [0.0, 0.0])}
    figure = figures.band_curves([1, 2], {"accuracy": curves}, "epoch", notes={"nce": "1 of 2 diverged", "ce": ""})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "nce, 1 of 2 diverged"]
    assert figure.axes[0].get_ylim()[1] > 60


def test_long_notes_in_the_legend_are_not_cut():
    arms = ("ce", "nce", "ce+weight_decay", "ce+dropout", "ce+early_stopping")
    curves = {arm: ([math.nan, math.nan], [0.0, 0.0]) for arm in arms}
    figure = figures.band_curves(
        [1, 2], {"a": curves, "b": curves}, "epoch", notes=dict.fromkeys(arms, "11 of 12 diverged")
    )
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert [text.get_text().split(", ")[1] for text in legend.get_texts()] == ["11 of 12 diverged"] * len(arms)
    for text in legend.get_texts():
        assert 0 < text.get_window_extent().x0 < text.get_window_extent().x1 < figure.bbox.width
