"""The page of an adapter's units in a browser, and what large ones leave out."""

import json
import re

import pytest
import torch

import mono_peft.unit_page
from mono_peft.texts import Texts
from mono_peft.unit_page import UnitPage
from mono_peft.unit_records import rounded

HARMLESS = "<img src=x onerror=alert(1)></script><b>"
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
WORDS = ["good", " film", "\n", " the", HARMLESS, " bad"]


def records(layers, r, examples=3):
    """Records as `unit_records.py` gives them, of made-up units."""
    generator = torch.Generator().manual_seed(0)

    def number():
        return float(torch.rand(1, generator=generator))

    for layer in range(layers):
        for kind in KINDS:
            for i in range(r):
                dead = i == r - 1
                largest = 0.0 if dead else 1 + number()
                example = {
                    "group": "task", "file": "task.jsonl", "row": 1, "text": i % 2, "first": 1, "peak": 2,
                    "tokens": WORDS[1:5], "latents": [0.0, -largest / 2, largest, largest / 100],
                }  # fmt: skip
                module = f"base_model.model.model.layers.{layer}.{kind}"
                rates = {"texts": [0.5, 0.4, 0.6], "tokens": [0.1, 0.05, 0.2], "strength": 0.3}
                writes = "residual stream" if kind != KINDS[0] else None
                yield rounded(
                    {
                        "module": module, "index": i, "density": 0.0 if dead else number() ** 3, "dead": dead,
                        "largest": largest, "groups": {"task": rates, "other": rates},
                        "chance": {"texts": 0.5, "tokens": 0.1}, "group": None if dead else ("task", "other")[i % 2],
                        "selectivity": 0.0 if dead else number(), "z": 0.0 if dead else 8 * number(),
                        "beyond_chance": False, "decoder_norm": number(),
                        "histogram": {"bin": None if dead else 0.125, "tokens": [0 if dead else 9] * 32},
                        "examples": [] if dead else [example] * examples, "sample": [] if dead else [example],
                        "writes": writes,
                        "logits": {"raised": [[" bad", 2.0], [HARMLESS, 1.0]], "lowered": [["good", -0.5]]}
                        if writes and not dead else None,
                        "nearest": {"encoder": [] if dead else [[module, (i + 1) % r, 0.5]], "decoder": []},
                    }
                    | ({"ablation": {"task": [0.25, 0.2, 0.3], "other": None}} if i == 0 else {})
                    | ({"provenance": [[811, 2.5], [4021, 1.0]]} if i == 0 else {})
                )  # fmt: skip


def made(tmp_path, layers, r, **options):
    texts = Texts(["task", "other"], [tmp_path / "task.jsonl"])
    for row in range(2):
        texts.add([0, 1, 2, 3, 4, 5], 0, row, 0, row + 1)
    facts = {
        "title": "Units of a/b",
        "line": "MonoLoRA",
        "without": "",
        "made": "today",
        "threshold": 4.0,
        "groups": 2,
    }
    page = UnitPage(facts, texts, 4.0)
    for record in records(layers, r, **options):
        page.add(record)
    path = tmp_path / "index.html"
    path.write_text(page.render(WORDS.__getitem__))
    return path


@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser(tmp_path, opened, width):
    page = opened(made(tmp_path, layers=2, r=40), width)
    inside, outside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inside <= outside == width
    smallest = "Math.min(...[...document.querySelectorAll('p, td, th, dt, dd, span, button, figcaption, text')]"
    assert page.evaluate(f"{smallest}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
    panel, rows = page.locator("#panel"), page.locator("#units tbody tr")
    assert "234 of 240 units (6 dead)" in page.locator("#count").inner_text()

    # the list: selectivity, those beyond chance first
    shown = [cell.split(" ") for cell in page.locator("#units tbody td:nth-child(2)").all_inner_texts()]
    values = [float(number) for number, *rest in shown if not rest]
    assert values == sorted(values, reverse=True)
    assert len(shown) == 50
    page.get_by_role("button", name="Density").click()
    shares = page.locator("#units tbody td:nth-child(5)").all_inner_texts()
    numbers = [float(share.split(" ")[0]) for share in shares]
    assert numbers == sorted(numbers, reverse=True)
    page.get_by_role("button", name="Density").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="Next").click()
    assert page.locator("#page").inner_text() == "Page 2 of 5"

    # search and filters
    page.locator("#search").fill("1.mlp.down_proj:0")
    page.wait_for_function("document.querySelectorAll('#units tbody tr').length === 1")
    rows.first.click()
    text = panel.inner_text()
    for part in ("1.mlp.down_proj:0", "Made by rows 811, 4021", "+250", "+200 to +300", "Raises", HARMLESS, "Lowers",
                 "1.mlp.down_proj:1", "task.jsonl, row 1", "Chance: 50.0 %"):  # fmt: skip
        assert part in text, part
    assert page.url.endswith("#1.mlp.down_proj%3A0")
    page.get_by_role("button", name="whole text").first.click()
    assert panel.locator(".example").first.inner_text().endswith("bad")
    spans = panel.locator(".example .text span")
    assert spans.nth(0).inner_text() == "good"
    peak = panel.locator(".example .peak").first
    assert "0, 114, 178" in peak.evaluate("e => getComputedStyle(e).backgroundColor")
    panel.get_by_role("button", name="1.mlp.down_proj:1", exact=True).click()
    assert panel.locator("h2").inner_text() == "1.mlp.down_proj:1"
    page.locator("#search").fill("")
    page.locator("#kind").select_option("self_attn.q_proj")
    page.locator("#prefers").select_option(label="other")
    page.locator("#dead").check()
    page.wait_for_function("document.getElementById('count').textContent.startsWith('38 of')")
    rows.first.click()
    assert "not applicable" in panel.inner_text()
    page.locator("#prefers").select_option(label="any group")
    page.locator("#search").fill("q_proj:39")
    page.wait_for_function("document.querySelectorAll('#units tbody tr').length === 2")
    rows.first.click()
    assert "This unit is dead here" in panel.inner_text()

    # the map opens units, a link too
    page.locator("#map").click(position={"x": 37, "y": 24})
    assert panel.locator("h2").inner_text() == "0.self_attn.q_proj:0"
    page.reload()
    assert panel.locator("h2").inner_text() == "0.self_attn.q_proj:0"
    inside, outside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inside <= outside == width


def test_nothing_of_a_text_is_html(tmp_path):
    html = made(tmp_path, layers=1, r=3).read_text()
    assert "<img" not in html
    assert html.count("</script>") == len(re.findall("<script", html))
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert HARMLESS in data["words"]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)


def test_the_page_stays_small(tmp_path):
    """30 layers of 7 modules of 8 units, here as 70 of 3, each with as many examples as there are."""
    path = made(tmp_path, layers=70, r=8, examples=8)
    assert path.stat().st_size < 10e6


def test_a_large_page_leaves_examples_and_then_panels_out(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(mono_peft.unit_page, "MOST_BYTES", 40_000)
    few = made(tmp_path, layers=2, r=14, examples=8)
    assert "hold at most 6 examples" in few.read_text()
    monkeypatch.setattr(mono_peft.unit_page, "MOST_BYTES", 20_000)
    fewer = made(tmp_path, layers=2, r=14, examples=8)
    left_out = int(re.search(r"the ([\d,]+) least selective units have no panel", fewer.read_text())[1])
    assert 10 < left_out < 70
    page = opened(fewer)
    assert "Examples" in page.locator("#panel").inner_text()  # the first of the list is the most selective
    page.get_by_role("button", name="Selectivity").click()
    page.locator("#units tbody tr").first.click()
    assert "units.jsonl has it" in page.locator("#panel").inner_text()
