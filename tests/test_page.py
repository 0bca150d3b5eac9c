"""The pages of `jetflow report`: what they say, in each format."""

import csv
import json
import math
import re
import shutil

import html_page
import numpy as np
import pytest
import tiny_runs

from jetflow import cli, workdir
from jetflow.files import write_json
from jetflow.sweeps import Sweep, axis, chain, product
from jetflow.tools.report import svg
from jetflow.tools.report.axes import axes
from jetflow.tools.report.content import (
    HeatMap,
    Lines,
    Page,
    Section,
    Series,
    Spot,
    Table,
    cell,
    number,
)
from jetflow.tools.report.html import render
from jetflow.tools.report.sweep import sweep_page
from jetflow.training.log import read_metrics, save_png


def report(capsys, *arguments) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# Of a run.


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained("jet"), tmp_path / "run")


def test_page_of_a_run(run, capsys):
    assert report(capsys, run) == f"{run}/report.html\n"
    page = html_page.read((run / "report.html").read_text())
    for title in ("Evaluations", "Training", "Samples", "Config", "Data", "Environment"):
        assert title.lower() in page.anchors
    assert page.tags["img"] == len(list(run.glob("samples/*.png"))) == 2
    (result,) = (json.loads(path.read_text()) for path in run.glob("evals/bpd-00000012.json"))
    assert number(result["value"]) in page.text
    assert result["data"]["checksum"] in page.text
    for plot in ("Likelihood", "Parts of the", "Gradient norm", "Throughput", "log-determinant's"):
        assert plot in page.text
    assert "held-out bpd" in page.text
    # The delta of the config, not its defaults.
    assert (
        "flow.num_couplings325" in page.text and "optim.b1" not in page.text.partition("Whole")[0]
    )
    (noted,) = workdir.read_environments(run)
    assert noted["from_step"] == 0 and noted["jaxlib"] in page.text


def test_run_as_markdown(run, capsys):
    text = report(capsys, run, "--format", "md")
    assert text.startswith("# Run run\n") and "| metric | value |" in text
    assert not re.search(r"<\w+", text) and not (run / "report.html").exists()


def test_run_as_csv(run, capsys, tmp_path):
    out = tmp_path / "new" / "metrics.csv"
    assert report(capsys, run, "--format=csv", f"--out={out}") == f"{out}\n"
    rows = list(csv.DictReader(out.open()))
    lines = read_metrics(run / "metrics.jsonl")
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        read = {name: float(value) for name, value in row.items() if value}
        assert read == {name: value for name, value in line.items() if value is not None}


def test_a_run_under_way_has_a_page(run, capsys):
    shutil.rmtree(run / "evals")
    shutil.rmtree(run / "samples")
    (run / "environment.json").unlink()
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1, "bpd": 8.5, "gradient_norm": null}\n{"step": 2, "bp')
    report(capsys, run)
    page = html_page.read((run / "report.html").read_text())
    assert "evaluations" not in page.anchors and "training" in page.anchors
    assert "Gradient norm" not in page.text
    assert "noted no environment" in page.text


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_no_run(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["report", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert ("no run in" if name == "empty" else "is no folder") in message


def test_environments_are_noted_where_they_change(tmp_path, monkeypatch):
    workdir.note_environment(tmp_path, 0)
    workdir.note_environment(tmp_path, 5)
    assert [one["from_step"] for one in workdir.read_environments(tmp_path)] == [0]
    here = workdir.environment()
    monkeypatch.setattr(workdir, "environment", lambda: here | {"devices": "8 x TPU v9"})
    workdir.note_environment(tmp_path, 9)
    known = workdir.read_environments(tmp_path)
    assert [(one["from_step"], one["devices"]) for one in known] == [
        (0, here["devices"]), (9, "8 x TPU v9"),
    ]  # fmt: skip
    assert here.items() <= known[0].items() and {"python", "jax", "flax", "numpy"} <= here.keys()


# Of a sweep.

VALUES = {"a": [0.0, 1.0, 2.0], "b": ["x", "y"], "tied": ["p", "q"]}


@pytest.fixture
def sweep(tmp_path):
    """A sweep of six points, whose fid is lowest at a=1, b=y; one failed and one is to come."""
    points = [
        {
            "a": {"value": a, "label": f"{a:g}"},
            "b": {"value": b, "label": b},
            "config.tied": {"value": VALUES["tied"][place], "label": VALUES["tied"][place]},
        }
        for a in VALUES["a"]
        for place, b in enumerate(VALUES["b"])
    ]
    content = {"title": "Six <points>.", "description": "Of a & b.", "metrics": ["fid"]}
    content |= {"config": "c.py", "run": None, "fixed": {"seed": 3}, "points": points}
    write_json(tmp_path / "sweep.json", content)
    for index, point in enumerate(points[:5]):
        name = f"{index:03d},point"
        record = {"number": index, "name": name, "status": "done", "seconds": 2.0}
        record |= {"environment": workdir.environment(), "workdir": "runs/none"}
        fid = 10 + 5 * (point["a"]["value"] - 1) ** 2 - (point["b"]["label"] == "y")
        network = {"weights_sha256": "0123456789", "published_weights": False}
        real = {"data": {"name": "digits", "checksum": "c0ffee"}}
        results = [{"metric": "fid", "value": fid, "network": network, "reference": real}]
        record |= {"metrics": {"fid": fid, "accuracy": 0.9 + index / 100}, "results": results}
        record |= {"errors": {"fid": None, "accuracy": 0.003}, "parameters": 1000}
        if index == 4:
            record |= {"status": "failed", "error": "it was <bad>", "metrics": {}, "errors": {}}
        write_json(tmp_path / "points" / f"{name}.json", record)
        if index < 4:
            save_png(tmp_path / "points" / f"{name}.png", np.full((8, 8, 3), index, np.uint8))
    return tmp_path


def test_points_that_are_as_good_are_counted(sweep):
    path = sweep / "points" / "000,point.json"
    record = json.loads(path.read_text())
    write_json(path, record | {"metrics": {"fid": 9.0}})
    assert (
        "the best fid is 9, at 2 points, the first a 0, b, tied x, p" in sweep_page(sweep).summary
    )


def test_page_of_a_sweep(sweep, capsys):
    report(capsys, sweep)
    page = html_page.read((sweep / "report.html").read_text())
    assert "Six <points>" in page.text and "Of a & b." in page.text
    assert "4 of 6 points measured, 1 failed; the best fid is 9, at a 1, b, tied y, q" in page.text
    assert page.marked == [["3", "9", "0.93", "0.003", "1", "y, q", "done"]]
    assert "lower is better" in page.text and "it was <bad>" in page.text
    assert "fid over a" in page.text and "accuracy over a" in page.text
    assert page.tags["img"] == 4
    assert "not measured yet" in page.text
    assert "The points took 10 seconds" in page.text
    assert page.text.count("SHA-256 01234567…, not the published one") == 1


def test_sweep_as_csv(sweep, capsys):
    rows = list(csv.DictReader(report(capsys, sweep, "--format=csv").splitlines()))
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed", "not measured yet"]
    assert [row["fid"] for row in rows] == ["15.0", "14.0", "10.0", "9.0", "", ""]
    assert [row["config.tied"] for row in rows] == ["p", "q"] * 3
    assert rows[4]["error"] == "it was <bad>" and rows[0]["accuracy_standard_error"] == "0.003"


def test_the_step_is_shown_where_points_differ_in_it(sweep):
    table = sweep_page(sweep).table
    assert table is not None and "step" not in table.header
    for step, path in enumerate((sweep / "points").glob("*.json")):
        write_json(path, json.loads(path.read_text()) | {"step": step})
    table = sweep_page(sweep).table
    assert table is not None and table.header[-2:] == ["step", "status"]


def test_a_chain_has_all_points_on_its_map(tmp_path, capsys):
    """Those without the axis of the columns in a column of their own, without it in the plots."""
    grid = chain(product(axis("a", [1, 2, 3]), axis("b", [4, 5])), axis("b", [6]), axis("c", [7]))
    write_json(tmp_path / "sweep.json", Sweep(grid, ("fid",), "c.py").content(None, None))
    for i in range(8):
        record = {"number": i, "name": "", "status": "done", "seconds": 1.0}
        record |= {"environment": {}, "metrics": {"fid": 8.25 - i}}
        write_json(tmp_path / "points" / f"{i}.json", record)
    text = report(capsys, tmp_path, "--format=md")
    everything = text.partition("### fid: all points")[2].partition("###")[0]
    assert "| 1 | 2 | 3 | – |" in everything
    assert [everything.count(f"{8.25 - i}") for i in range(8)] == [1] * 8


def test_repeats_are_one_point_with_their_spread(tmp_path, capsys):
    """Best is the better mean, not the luckiest seed."""
    grid = product(axis("net", ["lucky", "good"]), axis("config.train.seed", [0, 1, 2]))
    sweep = Sweep(grid, ("bpd",), "c.py", repeats=("config.train.seed",))
    write_json(tmp_path / "sweep.json", sweep.content(None, None))
    for i, bpd in enumerate((1.0, 5.0, 6.0, 3.0, 2.0)):
        record = {"number": i, "name": "", "status": "done", "seconds": 1.0}
        record |= {"environment": {}, "metrics": {"bpd": bpd}, "errors": {"bpd": 0.01}}
        write_json(tmp_path / "points" / f"{i}.json", record)
    page = sweep_page(tmp_path)
    assert page.table is not None and page.table.marked == 0
    assert page.table.header == ["point", "bpd ↓", "±", "net", "status"]
    (good, lucky), deviations = page.table.rows, [0.5**0.5, 7**0.5]
    assert good == ["1", 2.5, pytest.approx(deviations[0]), "good", "2 of 3 done"]
    assert lucky == ["0", 4.0, pytest.approx(deviations[1]), "lucky", "done"]
    assert page.summary == "5 of 6 points measured; the best mean bpd is 2.5, at net good"
    assert len(page.data.rows) == 6
    text = report(capsys, tmp_path, "--format=md")
    assert "± is their standard deviation" in text and "## Repeats" in text


def test_axes_are_called_by_names_that_differ():
    point = {"config.train.seed": {"value": 1, "label": "1"}, "seed": {"value": 1, "label": "1"}}
    other = point | {"seed": {"value": 2, "label": "2"}}
    third = other | {"config.train.seed": {"value": 2, "label": "2"}}
    assert [one.name for one in axes([point, other, third])] == ["train.seed", "seed"]


def test_an_error_of_lines_is_one_row(sweep, capsys):
    path = sweep / "points" / "004,point.json"
    write_json(path, json.loads(path.read_text()) | {"error": "first |\nsecond"})
    assert "| 004,point | first \\| second |" in report(capsys, sweep, "--format=md")


def test_a_page_asks_for_no_accelerator(sweep):
    """Which a training may hold."""
    process = tiny_runs.start(["report", str(sweep)], JAX_PLATFORMS="tpu")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0 and out == f"{sweep}/report.html\n", said
    assert not list(sweep.glob("*.tmp"))


def test_sweep_as_markdown(sweep, capsys):
    text = report(capsys, sweep, "--format=md")
    assert "| **3** | **9** | **0.93** | **0.003** | **1** | **y, q** | **done** |" in text
    order = re.findall(r"^\| \**(\d)\** \|", text, re.MULTILINE)
    assert order == ["3", "2", "1", "0", "4", "5"]


def test_higher_is_better_where_it_is(sweep):
    for path in (sweep / "points").glob("*.json"):
        record = json.loads(path.read_text())
        record["metrics"].pop("fid", None)
        write_json(path, record)
    table = sweep_page(sweep).table
    assert table is not None and table.marked == 0
    assert table.header[1] == "accuracy ↑" and table.rows[0][0] == "3"


def test_axes():
    point = lambda **of: {name: {"value": v, "label": str(v)} for name, v in of.items()}  # noqa: E731
    points = [point(x=x, y=2 * x, z=z, same=1) for x in (3, 1, 2) for z in (True, False)]
    first, second = axes(points)
    assert (first.settings, first.name) == (("x", "y"), "x, y")
    assert (first.labels, first.numbers) == (("3, 6", "1, 2", "2, 4"), (3, 1, 2))
    assert (second.settings, second.numbers) == (("z",), ())
    assert [first.place(p) for p in points] == [0, 0, 1, 1, 2, 2]
    assert first.place(point(z=True)) == -1


# What the parts look like.


def places(drawing: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)
    return [(float(x), float(y)) for x, y in found]


@pytest.mark.parametrize("log", [False, True])
def test_lines_lie_where_their_values_are(log):
    values = (1.0, 10.0, 100.0)
    plot = Lines("t", "x", "y", [Series("s", [(y, y) for y in values])], log_x=log, log_y=log)
    (x0, y0), (x1, y1), (x2, y2) = places(svg.lines(plot))
    assert (x0, x2) == (svg.LEFT, svg.RIGHT) and svg.TOP <= y2 < y1 < y0 <= svg.BOTTOM
    share = 1 / 2 if log else 9 / 99
    assert (x1 - x0) / (x2 - x0) == pytest.approx(share, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(share, abs=1e-3)


def test_what_cannot_be_drawn_is_left_out():
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 0.0), (5, 3.0)]
    assert len(places(svg.lines(Lines("t", "x", "y", [Series("s", points)])))) == 3
    assert len(places(svg.lines(Lines("t", "x", "y", [Series("s", points)], log_y=True)))) == 2
    assert svg.lines(Lines("t", "x", "y", [Series("s", [(1, math.nan)])])) == ""


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (3.0961, 3.0969), (0, 2e6), (-4, 5), (1e-6, 3e-4), (7, 7), (1e-6, 1.6e-5)],
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_differ(low, high, log):
    if log and low <= 0:
        low = high / 1e4
    plot = Lines("t", "x", "y", [Series("s", [(0, low), (1, high)])], log_y=log)
    ticks = re.findall(r'class="ytick" x="\d+" y="([\d.]+)">([^<]+)<', svg.lines(plot))
    assert 2 <= len(ticks) <= 8
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(svg.TOP <= float(y) - 4 <= svg.BOTTOM for y, _ in ticks)
    assert max(len(text) for _, text in ticks) <= 7


def test_heat_map_is_legible_and_marks_the_best():
    spots = [[Spot(1.0), Spot(2.0), None], [Spot(3.0), Spot(None, "failed"), Spot(2.5)]]
    for higher, best in ((True, "3"), (False, "1")):
        heat = HeatMap("t", "x", "y", ["a", "b", "c"], ["r", "s"], spots, higher)
        content = render(Page("t", "s", [Section("Maps", [heat])], Table([], [])))
        html_page.read(content)
        assert re.findall(r"★ ([\d.]+)", content) == [best]
        colours = re.findall(r"background:rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", content)
        assert len(colours) == 4
        for red, green, blue, ink in colours:
            paper = svg.luminance((int(red), int(green), int(blue)))
            light, dark = max(paper, ink == "#fff"), min(paper, ink == "#fff")
            assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, AA


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.09712, "3.097"), (12800, "12,800"), (1.2e-5, "1.2e-05"), (0.5, "0.5"), (12345.7, "12,346"),
     (None, "–"), (True, "yes"), ("<b>", "<b>"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_as_people_write_them(value, text):
    assert cell(value) == text


def test_text_is_escaped():
    table = Table(["<i>"], [["a & <script>"]], "x < y", marked=0)
    content = render(Page("<b>", "&", [Section("A < B", [table])], table))
    page = html_page.read(content)
    assert "a & <script>" in page.text and page.marked == [["a & <script>"]]
