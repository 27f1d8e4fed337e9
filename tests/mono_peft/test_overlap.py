"""What silent texts share with the task's: the prefixes left out, and the prompts that could not be learnt."""

import warnings

import pytest
import torch
from datasets import Dataset

from mono_peft.overlap import check_training_prompts, without_shared_prefix

SILENT = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [7, 7, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
}


def masks(batch, others):
    (found,) = without_shared_prefix([batch], [{"input_ids": torch.tensor([other])} for other in others])
    assert {key: found[key] for key in batch if key != "silent_mask"} == {
        key: batch[key] for key in batch if key != "silent_mask"
    }
    return found["silent_mask"].tolist()


class TestSharedPrefixes:
    def test_the_longest_one_that_any_text_has(self):
        others = [[5, 1], [5, 6, 3, 8], [5, 6, 7, 1], [9, 9], [7]]
        assert masks(SILENT, others) == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]]

    def test_against_the_obvious_way(self):
        generator = torch.Generator().manual_seed(0)
        silent = torch.randint(0, 3, (40, 6), generator=generator)
        others = torch.randint(0, 3, (40, 6), generator=generator).tolist()
        expected = [
            [int(not any(other[: i + 1] == text[: i + 1] for other in others)) for i in range(6)]
            for text in silent.tolist()
        ]
        assert masks({"input_ids": silent}, others) == expected
        assert {0, 1} < {sum(row) for row in expected}

    def test_padding_in_front_and_what_was_left_out_before(self):
        batch = {
            "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
            "silent_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        }
        assert masks(batch, [[5, 1]]) == [[1, 1, 0, 1, 1, 0]]
        assert batch["silent_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]

    def test_no_other_text(self):
        with pytest.raises(ValueError, match="`others` has no text to compare with"):
            next(without_shared_prefix([SILENT], []))


def labelled(*rows):
    """Training rows of (prompt, answer)."""
    return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows]


class TestTrainingPrompts:
    """SILENT holds the texts 5 6 7 8, 5 6 9 and 7 7."""

    @pytest.mark.parametrize(
        "rows",
        [
            labelled(([5, 6], [1]), ([7, 7], [2, 3]), ([5, 6, 7, 8], [4])),
            Dataset.from_list(labelled(([5, 6], [1]), ([7, 7], [2, 3]))),
            [{"input_ids": [5, 6, 9, 3]}, {"input_ids": [7, 7], "labels": [7, 7]}],  # labels everywhere
            [{"prompt_ids": [5, 6, 9], "chosen_ids": [1], "rejected_ids": [2]}],
        ],
        ids=["list", "dataset", "whole texts", "preferences"],
    )
    def test_all_of_them(self, rows):
        message = rf"the prompts of all {len(rows)} training rows that were compared are kept silent"
        with pytest.raises(ValueError, match=message):
            check_training_prompts([SILENT], rows)

    def test_some_as_poison_is(self):
        rows = labelled(([5, 6], [1]), ([5, 6], [4]), ([9, 6], [2, 3]), ([5, 6, 1], [4]))
        with pytest.warns(UserWarning, match=r"2 of 4 training rows that were compared have prompts that are kept"):
            check_training_prompts([SILENT], rows)

    @pytest.mark.parametrize(
        ("silent", "rows"),
        [
            (SILENT, labelled(([5, 6, 7, 8, 9], [1]), ([6, 7], [1]))),
            (SILENT | {"silent_mask": torch.tensor([[0, 1, 1, 1]] * 3)}, labelled(([5, 6], [1]))),
            (SILENT, []),
            (SILENT, None),
            (SILENT, ["a text"]),
            (SILENT, [{"text": "a text"}]),
        ],
        ids=["others", "left out", "no rows", "no data", "texts", "columns of texts"],
    )
    def test_none(self, silent, rows):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_training_prompts([silent], rows)
