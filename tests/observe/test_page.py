"""The page of `report --html`, opened in a real Chromium that clicks, types, drags and looks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.report import main
from tests.conftest import Call, small_config
from tests.test_train import merged, run

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow
EVIL = (
    "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"><b id=evil>{{data}}"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their learning rate; the name, prompts and samples of the first are hostile."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for name, lr in {"first": 3e-3, "second": 1e-3}.items():
        config = merged(
            small_config(data, folder / name), optimizer={"lr": lr}, logging={"every": 1},
            training={"sample_every": 10, "sample_tokens": 12, "sample_prompts": ["The cat"]},
        )  # fmt: skip
        found.append(run(config))
    settings = yaml.safe_load((found[0] / "config.yaml").read_text())
    settings["run"]["name"] = f"first {EVIL}"
    (found[0] / "config.yaml").write_text(yaml.safe_dump(settings))
    with (found[0] / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "prompt": "The cat", "text": EVIL}) + "\n")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window and without a network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; .ci/run installs it")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path, call: Call) -> Iterator[Open]:
    """Write the page of runs and open it; at the end nothing may have gone wrong in it, or out of it."""
    opened: list[tuple[Any, list[str], list[str]]] = []

    def opening(*paths: Path, **options: Any) -> Any:
        file = tmp_path / f"page-{len(opened)}.html"
        code, out, err = call(main, *paths, "--html", file)
        assert (code, err) == (0, "") and str(file) in out
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        errors: list[str] = []
        requests: list[str] = []
        page.on(
            "console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        opened.append((page, errors, requests))
        return page

    yield opening
    for page, errors, requests in opened:
        assert errors == []
        assert [url for url in requests if not url.startswith("file://") or not url.endswith(".html")] == []
        assert len(requests) == 1
        page.close()


def curves(page: Any, chart: str = "chart-train_loss") -> dict[tuple[str, str], str]:
    """What is drawn: (run, column) → the path."""
    found = page.query_selector_all(f"#{chart} path[data-run]")
    return {
        (path.get_attribute("data-run"), path.get_attribute("data-column")): path.get_attribute("d") for path in found
    }


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def plot_of(page: Any, chart: str = "chart-train_loss") -> tuple[Any, dict[str, float]]:
    plot = page.locator(f"#{chart} .plot")
    plot.scroll_into_view_if_needed()
    return plot, plot.bounding_box()


def test_every_record_is_drawn_where_it_belongs(runs: list[Path], open_page: Open) -> None:
    page = open_page(runs[1])
    drawn = corners(curves(page)["0", "train_loss"])
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows]
    assert len(drawn) == len(rows) == 30
    heights = [y for _, y in drawn]
    assert sorted(range(30), key=lambda i: losses[i]) == sorted(range(30), key=lambda i: (-heights[i], losses[i]))
    assert [x for x, _ in drawn] == sorted({x for x, _ in drawn})
    assert len(corners(curves(page)["0", "val_loss"])) == 3
    titles = page.locator(".chart h3").all_text_contents()
    assert len(titles) == 7 and not any("MFU" in title for title in titles), "a CPU has no MFU, so no empty chart"
    assert "healthy" in page.locator("#diagnosis").inner_text() or page.locator(".remark").count() > 0
    summary = page.locator("#summary").inner_text()
    assert f"{losses[0]:.3f} → {losses[-1]:.3f}" in summary


def test_a_run_without_a_record_takes_nothing_from_the_others(
    runs: list[Path], open_page: Open, tmp_path: Path
) -> None:
    empty = shutil.copytree(runs[1], tmp_path / "empty")
    for name in ("metrics.jsonl", "training_metrics.json"):
        (empty / name).unlink()
    page = open_page(runs[1], empty)
    assert {run for run, _ in curves(page)} == {"0"}
    assert page.locator("#x-axis option").count() == 3


def test_hovering_shows_the_values_of_all_runs(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    _, box = plot_of(page)
    tip = page.locator("#chart-train_loss .tip")
    assert tip.is_hidden()
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in runs]
    x, _ = corners(curves(page)["0", "train_loss"])[14]
    page.mouse.move(box["x"] + x, box["y"] + 100)
    assert tip.is_visible()
    told = tip.inner_text()
    assert "step 15" in told and "second" in told
    for of_run in rows:
        assert f"{of_run[14]['train_loss']:.4g}" in told
    assert page.locator("#chart-learning_rate .cursor").count() == 1, "the other charts show where that is"
    assert page.locator("#chart-learning_rate .tip").is_hidden()
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_smoothing_log_axes_and_the_x_axis_change_the_drawing(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    raw = curves(page)

    def roughness(path: str) -> float:
        ys = [y for _, y in corners(path)]
        return sum(abs(a - 2 * b + c) for a, b, c in zip(ys, ys[1:], ys[2:], strict=False))

    page.locator("#smooth").fill("0.8")
    smooth = curves(page)
    assert roughness(smooth["0", "train_loss"]) < 0.7 * roughness(raw["0", "train_loss"])
    assert page.locator("#smooth-value").inner_text() == "0.8"
    assert page.locator("#chart-train_loss .curve.faint").count() > 0, "what it was made from stays in sight"
    page.locator("#smooth").fill("0")
    assert curves(page) == raw

    page.locator("#log-y").check()
    logarithmic = curves(page)
    assert logarithmic.keys() == raw.keys()
    assert all(logarithmic[key] != raw[key] for key in raw)
    page.locator("#log-y").uncheck()
    page.locator("#log-x").check()
    (first, _), (second, _) = corners(curves(page)["0", "train_loss"])[:2]
    (plain_first, _), (plain_second, _) = corners(raw["0", "train_loss"])[:2]
    assert second - first > 3 * (plain_second - plain_first), "the first steps get more room"
    page.locator("#log-x").uncheck()

    axis = lambda: page.locator("#chart-train_loss svg text").all_text_contents()  # noqa: E731
    steps = axis()
    page.locator("#x-axis").select_option("tokens")
    assert axis() != steps and any("," in text or "k" in text for text in axis())
    page.locator("#x-axis").select_option("hours")
    _, box = plot_of(page)
    page.mouse.move(box["x"] + 400, box["y"] + 80)
    assert "hours of running" in page.locator("#chart-train_loss .tip").inner_text()


def test_dragging_zooms_all_charts_and_a_double_click_ends_it(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    raw, rates = curves(page), curves(page, "chart-learning_rate")
    plot, box = plot_of(page)
    points = corners(raw["0", "train_loss"])
    page.mouse.move(box["x"] + points[9][0], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + points[19][0], box["y"] + 90, steps=4)
    assert page.locator("#chart-train_loss .picked").count() >= 1
    page.mouse.up()
    zoomed = corners(curves(page)["0", "train_loss"])
    assert zoomed[19][0] - zoomed[9][0] > 2 * (points[19][0] - points[9][0])
    assert zoomed[9][0] == pytest.approx(58, abs=2)
    assert curves(page, "chart-learning_rate") != rates, "all charts show the same steps"
    plot.dblclick(position={"x": 300, "y": 100})
    assert curves(page) == raw


def test_it_can_be_used_with_the_keyboard_alone(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    raw = curves(page)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached >= {"smooth", "x-axis", "log-x", "log-y", "reset", "plot"}
    page.locator("#chart-train_loss .plot").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert "step 20" in page.locator("#chart-train_loss .tip").inner_text()
    page.keyboard.press("+")
    assert curves(page) != raw
    page.keyboard.press("0")
    assert curves(page) == raw


def test_a_run_that_is_switched_off_is_not_drawn(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    assert {number for number, _ in curves(page)} == {"0", "1"}
    page.locator("#runs input").nth(0).uncheck()
    assert {number for number, _ in curves(page)} == {"1"}
    assert page.locator("#sample-texts pre").count() == 1
    page.locator("#runs input").nth(1).uncheck()
    assert curves(page) == {}
    page.locator("#runs input").nth(0).check()
    assert {number for number, _ in curves(page)} == {"0"}


def test_samples_are_shown_over_time_and_config_differences_told(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    written = [json.loads(line) for line in (runs[1] / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in written] == [10, 20, 30]
    last = page.locator("#sample-texts pre").nth(1)
    assert last.text_content() == "The cat" + written[2]["text"]
    page.locator("#sample-step").fill("0")
    assert page.locator("#sample-step-value").inner_text() == "10"
    assert page.locator("#sample-texts pre").nth(1).text_content() == "The cat" + written[0]["text"]
    differences = page.locator("#differences").inner_text()
    assert "optimizer.lr" in differences and "0.003" in differences and "0.001" in differences
    assert "seq_len" not in differences


def test_hostile_text_stays_text(runs: list[Path], open_page: Open) -> None:
    page = open_page(*runs)
    assert "pwned" not in page.title() or "document.title" in page.title()
    assert page.title().startswith("llmtrain report · first </script>")
    assert page.locator("#evil").count() == 0 and page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    shown = page.locator("#sample-texts pre").nth(0).text_content()
    assert shown == "The cat" + EVIL
    assert page.locator("#runs .name").nth(0).text_content() == f"first {EVIL}"


def test_the_policy_forbids_the_network(runs: list[Path], browser: Any, tmp_path: Path, call: Call) -> None:
    assert call(main, runs[1], "--html", tmp_path / "page.html")[0] == 0
    page = browser.new_page()
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("fetch('https://example.org/').catch(() => 0)")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'}))")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    page.wait_for_function("() => true")
    assert page.evaluate("window.ran") is None
    for what in ("example.org/'", "example.org/x.png", "inline script"):
        assert any(what in text and "Content Security Policy" in text for text in blocked), what
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_in_light_and_dark(runs: list[Path], open_page: Open, scheme: str) -> None:
    page = open_page(*runs, viewport={"width": 380, "height": 800}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380, "nothing makes the page wider than the screen"
    width = page.locator("#chart-learning_rate").bounding_box()["width"]
    assert width > 330, "one chart beside the other would be too small"
    luminance = """(name) => { const c = getComputedStyle(document.body)[name].match(/\\d+/g).map(Number);
        return (c[0] * 299 + c[1] * 587 + c[2] * 114) / 255000; }"""
    ink, paper = page.evaluate(luminance, "color"), page.evaluate(luminance, "backgroundColor")
    assert (ink < 0.2 and paper > 0.9) if scheme == "light" else (ink > 0.8 and paper < 0.2)


def test_a_run_without_records_has_a_page(tmp_path: Path, open_page: Open) -> None:
    folder = tmp_path / "fresh"
    folder.mkdir()
    (folder / "run.json").write_text('{"launches": []}')
    page = open_page(folder)
    assert "no records yet" in page.locator("#charts").inner_text()
    assert "too few records" in page.locator("#diagnosis").inner_text()
