"""The page stands alone, says what was not measured, and runs nothing that others wrote."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qdiff.errors import InputError, IntegrityError
from qdiff.evaluation.metrics import DB_CAP
from qdiff.report import data as report_data
from qdiff.report import page as report
from qdiff.report import plots
from qdiff.report.page import (
    EngineResult,
    LayerResult,
    ModelInfo,
    PromptResult,
    Quality,
    ReportData,
    Sizes,
    StageResult,
    TimestepError,
    summary_lines,
    write_report,
)

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.example/a.png onerror=alert(1)>\"'&{{ 7*7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    VOID = {"meta", "link", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32), (200, 100, 40)).save(tmp_path / f"images/float-{index}.png")
        Image.new("RGB", (32, 32), (200, 100, 40 + 2 * index)).save(tmp_path / f"images/int8-{index}.png")
    layers = [
        LayerResult(f"transformer_blocks.{block}.{name}", "linear", wanted, {"onnxruntime": "int8"}, 30.0 + block, 0.5)
        for block in range(3)
        for name, wanted in (("attn1.to_q", "int8"), ("ff.net.2", "nvfp4"))
    ]
    return ReportData(
        model=ModelInfo("PixArt", "bundled", 66_800_000, "small weights"),
        recipe="w8a8",
        run_id="3fa2b4c5d6e7",
        engine="ov",
        baseline="fp32",
        quality=Quality(71.0, 42.0, 0.98, 0.97, 0.95),
        sizes=Sizes(268_000_000, 68_000_000, {"model.safetensors": 68_000_000}),
        prompts=[
            PromptResult("a red apple", 1, "images/float-0.png", "images/int8-0.png", math.inf, 1.0),
            PromptResult(HOSTILE, 2, "images/float-1.png", "images/int8-1.png", 42.0, 0.96),
        ],
        layers=[*layers, LayerResult("proj_out", "linear", "float", {"onnxruntime": "float"}, why=HOSTILE)],
        timesteps=[TimestepError(999.0, 38.0, 0.9999), TimestepError(19.0, 24.0, 0.998)],
        engines=[
            EngineResult("fp32", "PyTorch FP32", True, "", 0.342, 1.0, 1_240_000_000, psnr_db_mean=math.inf),
            EngineResult("ov", f"OpenVINO $x_1$ {HOSTILE}", True, "", 0.109, 3.14, 512_000_000),
            EngineResult("rtx", "TensorRT-RTX", False, "needs an NVIDIA GPU"),
        ],
        stages=[StageResult("calibrate", 74.2, 1_900_000_000)],
        versions={"qdiff": "0.1.0"},
        commands=["qdiff run --model pixart"],
        warnings=[HOSTILE],
    )


EMPTY = ReportData(ModelInfo("Wan", "bundled"), "w8a8", "0" * 12)


def written(run: Path, data: ReportData) -> tuple[str, dict]:
    html, facts = write_report(run, data)
    assert (html, facts) == (run / "report.html", run / "report.json")
    return html.read_text(encoding="utf-8"), json.loads(facts.read_text(encoding="utf-8"))


def test_json_is_the_data(tmp_path: Path, data: ReportData) -> None:
    _, facts = written(tmp_path, data)
    expected = asdict(data)
    expected["prompts"][0]["psnr_db"] = expected["engines"][0]["psnr_db_mean"] = DB_CAP  # JSON has no infinity
    assert facts == expected and facts["version"] == 1


def test_the_page_loads_nothing_and_hostile_text_is_text(tmp_path: Path, data: ReportData) -> None:
    html, _ = written(tmp_path, data)
    page = Page(html)
    assert not page.open
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}], "the only script is our own, inline"
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value.startswith(("data:", "#")), (tag, name, value[:80])
            assert "url(" not in value or "url(#" in value
            if name != "alt":  # a picture's text is its prompt
                assert "http" not in value.replace("http-equiv", ""), (tag, name, value[:80])
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert page.text.count(HOSTILE) >= 4, "prompt, warning, reason, engine"
    assert "$x_1$" in page.text, "no mathtext"


def test_identical_pictures_are_called_so(tmp_path: Path, data: ReportData) -> None:
    page = Page(written(tmp_path, data)[0])
    assert "1 identical, counted as 100 dB" in page.text
    data.quality, data.prompts = Quality(math.inf, math.inf, 1.0), data.prompts[:1]
    assert "Pictures are identical" in Page(written(tmp_path, data)[0]).text


def test_pictures_are_inlined_without_loss(tmp_path: Path, data: ReportData) -> None:
    import base64
    import io

    images = [attributes for tag, attributes in Page(written(tmp_path, data)[0]).tags if tag == "img"]
    assert len(images) == 6 and all(image["alt"] for image in images)
    pixels = []
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as picture:
            pixels.append(picture.convert("RGB").getpixel((9, 9)))
    assert pixels == [(200, 100, 40)] * 2 + [(0, 0, 0), (200, 100, 40), (200, 100, 42), (0, 0, 16)]


def test_nothing_is_invented(tmp_path: Path) -> None:
    html, facts = written(tmp_path, EMPTY)
    page = Page(html)
    assert page.text.count("not measured") >= 10
    assert not any(tag in ("img", "svg") for tag, _ in page.tags)
    assert not re.search(r"\d dB|\d×|None|nan", page.text.replace("100 dB", "").replace("11 × 11", ""))
    assert facts["layers"] == [] and facts["quality"]["psnr_db_mean"] is None
    assert any("not measured" in line for line in summary_lines(EMPTY))


@pytest.mark.parametrize("part", ["prompts", "layers", "timesteps", "engines", "stages", "commands", "versions"])
def test_each_part_may_be_missing(tmp_path: Path, data: ReportData, part: str) -> None:
    written(tmp_path, replace(data, **{part: type(getattr(data, part))()}))


def test_each_number_may_be_missing(tmp_path: Path, data: ReportData) -> None:
    for entry in [*data.prompts, *data.layers, *data.timesteps, *data.engines, *data.stages, data.quality, data.sizes]:
        for name, value in vars(entry).items():
            if isinstance(value, float) and name not in ("timestep",) or name.endswith("_bytes"):
                setattr(entry, name, None)
    page = Page(written(tmp_path, data)[0])
    assert "None" not in page.text and not any(tag == "svg" for tag, _ in page.tags)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_without_meaning_are_refused(tmp_path: Path, data: ReportData, value: float) -> None:
    data.engines[1].seconds_per_step = value
    with pytest.raises(InputError, match=r"engines\[1\].seconds_per_step"):
        write_report(tmp_path, data)
    assert not (tmp_path / "report.html").exists()


def test_nan_decibels_and_wrong_types_are_refused(tmp_path: Path, data: ReportData) -> None:
    with pytest.raises(InputError, match="psnr_db_mean"):
        write_report(tmp_path, replace(data, quality=Quality(math.nan)))
    with pytest.raises(InputError, match="run_id"):
        write_report(tmp_path, replace(data, run_id=None))  # type: ignore[arg-type]


def test_pictures_that_are_gone_become_a_warning(tmp_path: Path, data: ReportData) -> None:
    (tmp_path / "images/int8-0.png").unlink()
    (tmp_path / "images/int8-1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    html, facts = written(tmp_path, data)
    assert len(facts["warnings"]) == 3 and "seed 1 are not shown" in facts["warnings"][1]
    assert html.count("There are no pictures of this pair") == 2
    assert len(data.warnings) == 1, "the caller's data stay as they were"


def test_pictures_outside_the_run_are_refused(tmp_path: Path, data: ReportData) -> None:
    data.prompts[0].float_image = "../secret.png"
    with pytest.raises(IntegrityError):
        write_report(tmp_path, data)


def test_of_many_pairs_the_worst_are_shown(tmp_path: Path, data: ReportData) -> None:
    pair = data.prompts[1]
    data.prompts = [replace(pair, seed=seed, psnr_db=20.0 + seed) for seed in range(60, 0, -1)]
    html, facts = written(tmp_path, data)
    assert html.count('<article class="pair">') == report.MAX_PICTURE_PAIRS
    assert "<dd>1</dd>" in html and "<dd>60</dd>" not in html and len(facts["prompts"]) == 60


def test_long_prompts_fold_and_broken_text_is_repaired(tmp_path: Path, data: ReportData) -> None:
    data.prompts = [PromptResult("word " * 20_000, 1), PromptResult("lone \ud800", 2)]
    html, facts = written(tmp_path, data)
    assert "Whole prompt, 100,000 characters" in html and facts["prompts"][1]["prompt"] == "lone ?"


def test_plots_follow_the_theme_and_name_their_layers(tmp_path: Path, data: ReportData) -> None:
    html, _ = written(tmp_path, data)
    assert html.count('<svg class="plot wide"') == html.count('<svg class="plot narrow"') == 3
    assert "#0a0" not in html and "var(--s0)" in html and "<?xml" not in html and "<metadata" not in html
    assert "<title>transformer_blocks.2.ff.net.2: 32.0 dB, nvfp4</title>" in html
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert target in names


def test_layers_of_another_precision_are_counted(tmp_path: Path, data: ReportData) -> None:
    html, _ = written(tmp_path, data)
    assert "3 of 7 layers run in another precision" in html
    assert "layers    3 of 7" in "\n".join(summary_lines(data))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer_blocks.3.attn1.to_out.0", "transformer_blocks.3"),
        ("blocks.11.ffn.net.0.proj", "blocks.11"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.attentions.0"),
        ("up_blocks.2.upsamplers.0.conv", "up_blocks.2.upsamplers.0"),
        ("mid_block.resnets.0.conv1", "mid_block"),
        ("adaln_single.linear", "adaln_single"),
        ("proj_out", "proj_out"),
    ],
)
def test_layers_are_grouped_by_block(name: str, block: str) -> None:
    assert plots._block(name) == block


def test_numbers_for_people() -> None:
    assert [report_data.megabytes(size) for size in (None, 12, 68_240_000, 999_950_000, 2 * 10**12)] == [
        "not measured",
        "12 B",
        "68.2 MB",
        "1 GB",
        "2,000 GB",
    ]
    assert [report_data.seconds(value) for value in (2e-6, 0.1054, 0.99951, 1.234, 75.2)] == [
        "2 µs",
        "105 ms",
        "1 s",
        "1.23 s",
        "1m15s",
    ]
    assert [report_data.db(value) for value in (None, 38.94, 100.0)] == ["not measured", "38.9 dB", "identical"]
    assert [report_data.times(value) for value in (0.456, 3.94, 9.96, 12.4)] == ["0.46×", "3.9×", "10×", "12×"]


def test_the_summary_is_for_a_terminal(data: ReportData) -> None:
    data.warnings = ["red \x1b[31m text\nand a line"]
    lines = summary_lines(data)
    assert all(line.isprintable() for line in lines)
    assert any("3.9× smaller" in line for line in lines) and any("109 ms a step" in line for line in lines)


def test_a_busy_machine_gives_no_speed(tmp_path: Path, data: ReportData) -> None:
    quiet, busy = data.engines[1], "other processes used 1.0 of the 2 cores"
    data.engines[1] = replace(quiet, speedup=18.7, speedup_low=2.1, speedup_high=20.4, speed_reason=busy)
    assert "18.7" not in report.headline(data) and "too busy to tell the speed" in report.headline(data)
    assert any("machine busy: not reliable (2.1 to 20×)" in line for line in summary_lines(data))
    page, facts = written(tmp_path, data)
    assert "machine busy: not reliable (2.1 to 20×)" in page and "19×" not in page
    assert facts["engines"][1]["speed_reason"] == busy
    data.engines[1] = replace(quiet, speedup_low=3.0, speedup_high=3.3)
    assert "3.1× as fast" in report.headline(data)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_our_script_and_no_other(tmp_path: Path, data: ReportData) -> None:
    """The policy's hash fits the script (else there would be no slider), and the prompt's script did not run."""
    write_report(tmp_path, data)
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path}/browser"]
    page = (tmp_path / "report.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('type="range"') == 2
    assert "<title>PixArt · w8a8 · qdiff report</title>" in done.stdout


def test_the_engine_table_needs_no_scrolling_on_a_laptop(tmp_path: Path, data: ReportData, browser: Any) -> None:
    usual = {"seconds_per_step": 0.0254, "peak_memory_bytes": 43_800_000, "file_bytes": 4_900_000, "psnr_db_mean": 52.8}
    busy = {"speedup": 1.1, "speedup_low": 0.64, "speedup_high": 2.4, "speed_reason": "two other processes"}
    data.engines = [
        EngineResult("ov", "OpenVINO (CPU)", note="built for cpu", **usual, **busy),
        EngineResult("fp32", "float model in torch (the reference)", **usual, **busy),
        EngineResult(
            "rtx", "TensorRT-RTX (GeForce and RTX PRO GPUs)", False, "engine 'tensorrt_rtx' needs an NVIDIA GPU"
        ),
    ]
    write_report(tmp_path, data)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    table = page.get_by_role("region", name="Table of engines")
    assert table.evaluate("one => one.scrollWidth <= one.clientWidth")
    page.close()
