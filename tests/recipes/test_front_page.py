"""The figure of README, with and without rows."""

import front_page
import pytest
from frontier import COLUMNS
from matplotlib.image import imread


@pytest.fixture
def rows_file(tmp_path):
    lines = [",".join(COLUMNS)]
    for method, accuracy, refused in (("base", 0.75, 0.96), ("lora", 0.85, 0.0), ("monolora", 0.8, 0.1)):
        for seed in (0, 1, 2):
            for metric, task, value in (("accuracy", "", accuracy), ("refused_harmful", "refusal_offline", refused)):
                lines.append(f"10 % poison,{method},{seed},,{metric},{task},,{value + seed / 100},100,1")
    (tmp_path / "frontier.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "frontier.csv"


def test_with_rows_it_has_a_second_part(rows_file, tmp_path):
    front_page.main(["--output", str(tmp_path / "idea.png")])
    front_page.main(["--rows", str(rows_file), "--output", str(tmp_path / "both.png")])
    assert imread(tmp_path / "both.png").shape[1] > 2 * imread(tmp_path / "idea.png").shape[1]
    assert (tmp_path / "both.png").stat().st_size < 100_000


def test_rows_that_lack_what_is_drawn_are_refused(rows_file, tmp_path):
    rows_file.write_text(f"{rows_file.read_text()}the task alone,lora+kl,0,,accuracy,,,0.5,100,1\n")
    with pytest.raises(ValueError, match=r"--methods has lora\+kl, of which --rows .* has no rows of '10 % poison'"):
        front_page.main(["--rows", str(rows_file), "--methods", "lora", "lora+kl"])
    rows_file.write_text(rows_file.read_text().replace("10 % poison", "the task alone"))
    with pytest.raises(ValueError, match="has the task alone, and no rows of '10 % poison'"):
        front_page.main(["--rows", str(rows_file)])
