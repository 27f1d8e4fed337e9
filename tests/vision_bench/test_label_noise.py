"""Wrong labels by name: pair flips, and the labels that people gave, from counts or from a file."""

import os
from pathlib import Path

import pytest
import torch

from vision_bench.corruptions import flip_labels, pair_flips
from vision_bench.label_noise import (
    HUMAN,
    HumanLabels,
    condition,
    given_labels,
    named,
    read_human_labels,
    words,
    wrong_share,
)

LABELS = torch.arange(300) % 3
COUNTS = torch.tensor([[80, 20, 0], [5, 90, 5], [0, 40, 60]])


def drawn(seed, labels=LABELS, counts=COUNTS):
    return HumanLabels(counts).draw(labels, torch.Generator().manual_seed(seed))


def confusion(labels, given):
    return torch.stack([torch.bincount(given[labels == c], minlength=3) for c in range(3)])


def test_a_class_of_as_many_images_as_labels_gets_exactly_the_counts():
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(confusion(LABELS, first), COUNTS)
    assert torch.equal(confusion(LABELS, other), COUNTS)
    assert wrong_share(first, LABELS) == pytest.approx(70 / 300)


def test_more_images_get_the_counts_again_and_fewer_a_draw_of_them():
    many = torch.arange(3).repeat_interleave(200)
    assert torch.equal(confusion(many, drawn(0, many)), 2 * COUNTS)
    between = torch.arange(3).repeat_interleave(150)
    counts = confusion(between, drawn(0, between))
    assert (counts >= COUNTS).all()
    assert (counts <= 2 * COUNTS).all()
    few = torch.arange(3).repeat_interleave(10)
    found = [confusion(few, drawn(seed, few)) for seed in range(200)]
    assert all((counts <= COUNTS).all() for counts in found)
    mean = torch.stack(found).double().mean(dim=0)
    assert torch.allclose(mean, COUNTS.double() / 10, atol=0.5)


def test_the_images_that_are_wrong_are_any_of_their_class():
    often = torch.stack([drawn(seed) != LABELS for seed in range(300)]).double().mean(dim=0)
    for c, share in enumerate((0.2, 0.1, 0.4)):
        assert ((often[c == LABELS] - share).abs() < 5 * (share * (1 - share) / 300) ** 0.5).all()


def test_pair_flips_are_the_next_class_of_exactly_so_many():
    labels = torch.tensor([0, 2, 5]).repeat_interleave(40)  # classes without images are passed over
    given = pair_flips(labels, 0.45, 6, torch.Generator().manual_seed(0))
    wrong = given != labels
    assert wrong.sum() == 54
    following = {0: 2, 2: 5, 5: 0}
    assert given[wrong].tolist() == [following[label] for label in labels[wrong].tolist()]
    assert torch.equal(given, pair_flips(labels, 0.45, 6, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="samples of 1 class"):
        pair_flips(torch.zeros(4, dtype=torch.long), 0.5, 2, torch.Generator())
    with pytest.raises(ValueError, match=r"noise_rate is 1\.5"):
        pair_flips(labels, 1.5, 6, torch.Generator())


def test_noises_by_name():
    for noise, function in ((0.4, flip_labels), ("pair_flips 0.4", pair_flips)):
        given = given_labels(LABELS, noise, 3, torch.Generator().manual_seed(2))
        assert torch.equal(given, function(LABELS, 0.4, 3, torch.Generator().manual_seed(2)))
    assert torch.equal(given_labels(LABELS, HUMAN, 3, torch.Generator().manual_seed(2), HumanLabels(COUNTS)), drawn(2))
    assert [named("label_noise", 0.4), named("pair_flips", 0.4)] == [0.4, "pair_flips 0.4"]
    assert [words(noise) for noise in (0.0, 0.4, "pair_flips 0.45", HUMAN)] == [
        "0 %", "40 %", "45 % pair flips", "human labels"
    ]  # fmt: skip
    assert [condition(noise) for noise in (0.4, "pair_flips 0.45", HUMAN)] == [
        "40 % wrong labels", "45 % pair flips", "human labels"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'rotated' is no condition that changes training labels"):
        given_labels(LABELS, "rotated 0.4", 3, torch.Generator())
    with pytest.raises(ValueError, match="no labels that people gave; give human_labels"):
        given_labels(LABELS, HUMAN, 3, torch.Generator())


def test_files_of_counts_and_of_labels(tmp_path):
    counts, labels = tmp_path / "counts.csv", tmp_path / "labels.csv"
    counts.write_text("80,20,0\n5,90,5\n0,40,60\n")
    labels.write_text("".join(f"{label}\n" for label in drawn(7).tolist()))
    assert torch.equal(read_human_labels(counts).counts, COUNTS)
    people = read_human_labels(labels)
    people.check(LABELS, 3)
    for seed in (0, 1):  # they are as they are
        assert torch.equal(people.draw(LABELS, torch.Generator().manual_seed(seed)), drawn(7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("true,given\n1,2\n", "cannot be read .* CSV file of integers without a header"),
        ("", "has 0 lines"),
        ("1,2,3\n4,5,6\n", "has 2 lines of 3 numbers; it takes as many lines as columns"),
        ("9,-1\n1,9\n", "has -1 in line 1, column 2; it takes integers of at least 0"),
        ("0.9,0.1\n0.1,0.9\n", "has 0.9 in line 1, column 1"),
        ("9,nan\n1,9\n", "has nan in line 1, column 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_human_labels(tmp_path / "people.csv")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"human_labels .*people\.csv cannot be read"):
        read_human_labels(tmp_path / "people.csv")


@pytest.mark.parametrize(
    ("people", "message"),
    [
        (HumanLabels(COUNTS[:2, :2]), "counts of 2 classes and the images are of 3"),
        (HumanLabels(COUNTS * torch.tensor([[1], [0], [1]])), "no counts in row 2, of a class that has images"),
        (HumanLabels(COUNTS.roll(1, dims=0)), "its classes are not in the order of the training classes"),
        (HumanLabels(labels=drawn(0)[:-1]), "has 299 labels for 300 training images"),
        (HumanLabels(labels=drawn(0) + 1), "has the class 3; the images are of classes 0 to 2"),
        (
            HumanLabels(labels=drawn(0)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]),
            "its images are not in the order of the training images",
        ),
    ],
)
def test_labels_of_other_images_are_refused(people, message):
    with pytest.raises(ValueError, match=message):
        people.check(LABELS, 3)


def test_the_counts_of_cifar_100n():
    path = Path(os.environ.get("MONO_TEST_DATA", "nowhere")) / "cifar100n" / "counts.csv"
    if not path.exists():
        pytest.skip("MONO_TEST_DATA has no cifar100n/counts.csv")
    labels = torch.arange(100).repeat_interleave(500)
    people = read_human_labels(path)
    people.check(labels, 100)
    assert wrong_share(people.draw(labels, torch.Generator().manual_seed(0)), labels) == pytest.approx(0.402, abs=5e-4)
