"""All rows to one page: what stands on it, and how it looks in a browser."""

import importlib
import re

import pytest
import tables
from tables import main
from written_runs import salient

BY = {experiment.recipe: experiment for experiment in tables.experiments()}


@pytest.fixture(scope="module")
def page_folder(runs):
    """The page of these runs, with its tables and pictures."""
    output = runs.parent / "tables"
    main(["--runs", str(runs), "--output_dir", str(output)])
    return output


def test_ours_stands_beside_the_papers(page_folder):
    page = (page_folder / "index.html").read_text()
    text = (page_folder / "results.md").read_text()
    # mean of 0.7 and 0.72, half-width 12.7 * 0.01
    assert "| ncl | 71.0 ± 12.7 |" in text
    assert '<td>ncl</td>\n<td style="text-align:right">71.0 ± 12.7</td>' in page
    assert "<td>ncl, the paper, CIFAR-100</td>" in page
    assert "+9.2 for NCL" in page
    assert "Linear probes on frozen features under label noise: digits, small_conv" in page
    assert "2 seeds, cpu (1 threads), torch" in page
    assert "left out: pretrain" in page
    for name in (
        "label_noise_probing/gains_beside_paper",
        "label_noise_probing/figure_1b",
        "salient_features/figure_4c",
    ):
        assert (page_folder / f"{name}.png").stat().st_size > 5000
        assert (page_folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({name}.png)" in text
    assert (page_folder / "label_noise_probing" / "results.md").read_text().startswith("# Linear probes")


def test_what_has_no_rows_is_on_the_page_with_its_command(page_folder):
    page = (page_folder / "index.html").read_text()
    for recipe, experiment in BY.items():
        assert f'<section id="{recipe}">' in page
        assert f'href="#{recipe}"' in page
        assert (experiment.command in page) == (recipe not in ("label_noise_probing", "salient_features"))


def test_the_page_needs_nothing_else(page_folder):
    page = (page_folder / "index.html").read_text()
    sources = re.findall(r"(?:src|<link[^>]*href)=\"([^\"]{0,30})", page)
    assert len(sources) == 5
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert all(re.findall(r'<img alt="([^"]+)"', page))


def test_names_in_rows_are_text_on_the_page(tmp_path):
    salient(tmp_path / "runs", data="<img src=x onerror=alert(1)>", image_size="`<b>`|*")
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_4c"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_only_what_is_asked_for(runs, tmp_path):
    main(["--runs", str(runs), "--output_dir", str(tmp_path), "--only", "figure_4c"])
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["salient_features"]
    assert not (tmp_path / "label_noise_probing").exists()
    # Fig. 1(b) has parts by two recipes, of which one was run
    main(["--runs", str(runs), "--output_dir", str(tmp_path), "--only", "figure_1b"])
    assert 'id="input_noise_probing"' in (tmp_path / "index.html").read_text()


def test_every_recipe_with_a_table_or_figure_is_known():
    folder = tables.Path(tables.__file__).parent
    recipes = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    recipes -= {"tables", "pretrain"}
    # These have no part in the paper.
    recipes -= {"silence_frontier", "planted_units", "safety_data", "front_page", "basis_tables"}
    shared = {name for name in recipes if not hasattr(importlib.import_module(name), "main")}
    assert set(BY) == recipes - shared
    assert len(BY) == len(tables.RECIPES)


@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser(page_folder, opened, width):
    """Every picture loaded, no part wider than the screen."""
    page = opened(page_folder / "index.html", width)
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    inside, outside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption, code')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    where = "document.getElementById('salient_features').getBoundingClientRect().top"
    before = page.evaluate(where)
    page.get_by_role("link", name=re.compile("Figure 4\\(c\\)")).click()
    after = page.evaluate(where)
    assert len(images) == 4
    assert all(
        complete and natural > 500 and min(width - 60, 400) < shown <= width for complete, natural, shown in images
    )
    assert inside <= outside == width
    assert smallest >= 12
    assert abs(after) < 5 < 500 < before
