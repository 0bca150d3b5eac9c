"""The pages of `jetflow report`: their content, in each format."""

import csv
import json
import re
import shutil

import html_page
import jax
import numpy as np
import pytest

import jetflow
from jetflow import cli
from jetflow.files import read_metrics, write_json
from jetflow.pictures import save_png
from jetflow.sweeps import Sweep, axis, chain, product
from jetflow.tools.report import plots
from jetflow.tools.report.document import render, text
from jetflow.tools.report.run_page import POINTS, run_page
from jetflow.tools.report.sweep_page import axes_of, sweep_page
from jetflow.workdir import environment, scan_environments


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained("jet"), tmp_path / "run")


def rows_of(folder) -> list[dict[str, str]]:
    return list(csv.DictReader(str(jetflow.report(folder, "csv")).splitlines()))


def test_page_of_a_run(run, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    page = html_page.read((run / "report.html").read_text())
    for title in ("evaluations", "training", "samples", "config", "data", "environment"):
        assert title in page.anchors
    assert page.tags["img"] == len(list(run.glob("samples/*.png"))) == 2
    result = json.loads((run / "evals/bpd-00000012.json").read_text())
    assert text(result["value"]) in page.text and result["data"]["checksum"] in page.text
    for plot in ("Likelihood", "Parts of the", "Gradient norm", "Throughput", "log-determinant's"):
        assert plot in page.text
    assert "held-out bpd" in page.text
    # Changed fields beside their defaults.
    assert "flow.num_couplings325" in page.text
    assert scan_environments(run)[0][0]["jaxlib"] in page.text


def test_config_shows_what_differs_from_the_defaults_of_the_run(run):
    changes = {name: (old, new) for name, old, new in run_page(run)["changes"]}
    assert changes["flow.num_couplings"] == (32, 5) and changes["data.labels"] == (False, True)
    assert "optim.b1" not in changes and "defaults" not in run_page(run)["config"]
    config = json.loads((run / "config.json").read_text())
    del config["resolved"]["defaults"]  # as of a run that recorded none
    write_json(run / "config.json", config)
    shutil.rmtree(run / "checkpoints")
    assert run_page(run)["changes"] is None
    assert "no record of the defaults" in str(jetflow.report(run, "md"))


def test_run_as_text(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--format", "md"]) == 0
    content = capsys.readouterr().out
    assert content.startswith("# Run run\n") and re.search(r"\| metric +\| value", content)
    assert not re.search(r"<\w+", content) and not (run / "report.html").exists()
    out = tmp_path / "new" / "metrics.csv"
    assert jetflow.report(run, "csv", out) == out
    lines = read_metrics(run / "metrics.jsonl")
    for row, line in zip(csv.DictReader(out.open()), lines, strict=True):
        read = {name: float(value) for name, value in row.items() if value}
        assert read == {name: value for name, value in line.items() if value is not None}


def test_run_under_way(run):
    shutil.rmtree(run / "evals")
    shutil.rmtree(run / "samples")
    (run / "environment.json").unlink()
    lines = [
        f'{{"step": {step}, "bpd": {step}.5, "gradient_norm": null}}' for step in range(1, 999)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 999, "bp']))
    page = html_page.read(render(run_page(run)))
    assert "evaluations" not in page.anchors and "training" in page.anchors
    assert "Gradient norm" not in page.text and "has no environment" in page.text
    line = run_page(run)["lines"]["bpd"]
    assert len(line) <= POINTS and line[0] == (2.5, 3.0) and line[-1] == (997.5, 998.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "is no folder"), ("file", "is no folder"), ("empty", "no run in"),
     ("", "neither a run nor a sweep; give one that is in it: run")],
)  # fmt: skip
def test_no_page(name, message, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["report", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def write_sweep(folder, sweep, metrics, **content):
    """A sweep's folder whose first points have these metrics; None for a point that failed."""
    write_json(folder / "sweep.json", sweep.content(None, {}) | content)
    for point, values in zip(sweep.points, metrics, strict=False):
        record = {"number": point.number, "name": point.name, "seconds": 2.0, "errors": {}}
        record |= {"environment": environment(), "metrics": values or {}, "status": "done"}
        network = {"weights_sha256": "0123456789", "published_weights": False}
        record |= {"results": [{"metric": "fid", "value": 1.0, "network": network}]}
        record |= (
            {"parameters": 1000} if values else {"status": "failed", "error": "a |\n<bad> one"}
        )
        write_json(folder / "points" / f"{point.name}.json", record)


@pytest.fixture
def sweep(tmp_path):
    """Six points, of which 3 has the lowest fid, 4 failed, and 5 is to come."""
    tied = {"x": "p", "y": "q"}
    grid = product(
        axis("a", [0.0, 1.0, 2.0]),
        chain(*(product(axis("b", [b]), axis("config.tied", [t])) for b, t in tied.items())),
    )
    metrics = [{"fid": fid, "accuracy": 0.9 + i / 100} for i, fid in enumerate((15, 14, 10, 9.0))]
    write_sweep(
        tmp_path, Sweep(grid, ("fid",), "c.py", fixed={"seed": 3}), [*metrics, None],
        title="Six <points>.", description="Of a & b.",
    )  # fmt: skip
    for path in list(tmp_path.glob("points/*.json"))[:4]:
        save_png(path.with_suffix(".png"), np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def test_page_of_a_sweep(sweep, monkeypatch):
    monkeypatch.setattr(jax, "devices", None)  # a training may hold the accelerator
    page = html_page.read(jetflow.report(sweep).read_text())
    assert "Six <points>" in page.text and "Of a & b." in page.text
    assert "4 of 6 points measured, 1 failed; the best fid is 9, at a 1, b, tied y, q" in page.text
    assert page.marked == [["3", "9", "0.93", "1", "y, q", "done"]]
    assert "lower is better" in page.text and "<bad> one" in page.text
    assert "fid over a" in page.text and "accuracy over a" in page.text
    assert page.tags["img"] == 4 and "not measured yet" in page.text
    assert "The points took 10 seconds" in page.text
    assert page.text.count("SHA-256 01234567…, not the published one") == 1
    assert not list(sweep.glob("*.tmp"))


def test_sweep_as_text(sweep):
    rows = rows_of(sweep)
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed", "not measured yet"]
    assert [row["fid"] for row in rows] == ["15", "14", "10", "9.0", "", ""]
    assert [row["config.tied"] for row in rows] == ["p", "q"] * 3
    content = str(jetflow.report(sweep, "md"))
    cells = [re.split(r" *\| *", line)[1:-1] for line in content.splitlines() if "|" in line]
    assert [f"**{cell}**" for cell in ("3", "9", "0.93", "1", "y, q", "done")] in cells
    assert [row[0].strip("*") for row in cells[2:8]] == ["3", "2", "1", "0", "4", "5"]
    assert "a \\| \\<bad\\> one" in content  # one row, whatever the error


def test_a_sweep_leaves_out_what_is_damaged_and_shows_names_as_they_are(sweep):
    whole, cut, *_ = sorted(sweep.glob("points/*.json"))
    cut.write_text(cut.read_text()[:40])
    record = json.loads(whole.read_text()) | {"status": "failed", "error": "*a*_b | <i>\n# c"}
    write_json(whole, record)
    page = sweep_page(sweep)
    assert page["measured"] == 2 and len(page["damaged"]) == 1 and cut.name in page["damaged"][0]
    assert "\\*a\\*\\_b \\| \\<i\\> # c |" in render(page, "md")
    assert "*a*_b | <i>\n# c" in html_page.read(render(page)).text


def test_higher_is_better_where_it_is(tmp_path):
    metrics = [{"accuracy": value} for value in (0.1, 0.3, 0.2)]
    write_sweep(tmp_path, Sweep(axis("a", [1, 2, 3]), ("accuracy",)), metrics)
    table = sweep_page(tmp_path)["table"]
    assert table["header"][1] == "accuracy ↑" and [row[0] for row in table["rows"]] == [
        "1",
        "2",
        "0",
    ]


def test_chain_has_all_points_on_its_map(tmp_path):
    """Those without the axis of the columns are in a column of their own."""
    grid = chain(product(axis("a", [1, 2, 3]), axis("b", [4, 5])), axis("b", [6]), axis("c", [7]))
    write_sweep(tmp_path, Sweep(grid, ("fid",)), [{"fid": 8.25 - i} for i in range(8)])
    content = str(jetflow.report(tmp_path, "md")).partition("### fid: all points")[2]
    assert re.search(r"\| 1 +\| 2 +\| 3 +\| – +\|", content)
    assert [content.count(f"{8.25 - i}") for i in range(8)] == [1] * 8


def test_repeats_are_one_point_with_their_spread(tmp_path):
    """Best is the better mean, not the luckiest seed."""
    grid = product(axis("net", ["lucky", "good"]), axis("config.train.seed", [0, 1, 2]))
    sweep = Sweep(grid, ("bpd",), "c.py", repeats=("config.train.seed",))
    write_sweep(tmp_path, sweep, [{"bpd": bpd} for bpd in (1.0, 5.0, 6.0, 3.0, 2.0)])
    table = sweep_page(tmp_path)["table"]
    assert table["header"] == ["point", "bpd ↓", "± of bpd", "net", "status"] and table["best"] == 0
    assert table["rows"] == [
        ("1", 2.5, pytest.approx(0.5**0.5), "good", "2 of 3 done"),
        ("0", 4.0, pytest.approx(7**0.5), "lucky", "done"),
    ]
    content = str(jetflow.report(tmp_path, "md"))
    assert "5 of 6 points measured; the best mean bpd is 2.5, at net good" in content
    assert "± is their standard deviation" in content and "## Repeats" in content
    assert len(rows_of(tmp_path)) == 6


def test_settings_that_change_together_are_one_axis():
    grid = chain(*(
        product(axis("x", [x]), axis("y", [2 * x]), axis("config.y", [True, False]))
        for x in (3, 1, 2)
    ))  # fmt: skip
    points = [dict(choices=point) for point in Sweep(grid, ("bpd",)).content(None, {})["points"]]
    first, second = axes_of(points)
    assert (first.settings, first.name) == (("x", "y"), "x, y")
    assert first.values == {"3, 6": 3, "1, 2": 1, "2, 4": 2}
    assert second.name == "config.y" and [second.label(point) for point in points[:2]] == [
        "True", "False"
    ]  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
def test_plots_take_the_colour_of_the_page(log):
    lines = {f"line {i}": [(1, 1.0 + i), (2, 10.0), (3, 1e3)] for i in range(9)}
    for shown in (lines, dict([*lines.items()][:3])):
        drawing = plots.svg("title", "x", "y", shown, log)
        assert "currentColor" in drawing and plots.INK not in drawing
        named = re.findall(r">(line \d)<", drawing)
        assert named == ([*shown] if len(shown) == 3 else ["line 0", "line 8"])
        assert plots.svg("title", "x", "y", shown, log) == drawing
        ids = [set(re.findall(r'id="(.*?)"', plots.svg(n, "x", "y", shown))) for n in "ab"]
        assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 0.6, 1.0])
def test_shades_are_legible(value):
    red, green, blue, ink = re.findall(r"\d+|#\w+", plots.shade(value, 0.0, 1.0))
    channels = np.array([int(red), int(green), int(blue)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    paper = float(linear @ [0.2126, 0.7152, 0.0722])
    light, dark = max(paper, ink == "#fff"), min(paper, ink == "#fff")
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, AA


@pytest.mark.parametrize(
    ("value", "written"),
    [(3.09712, "3.097"), (12800, "12,800"), (1.2e-5, "1.2e-05"), (0.5, "0.5"), (12345.7, "12,346"),
     (None, "–"), (True, "yes"), ("<b>", "<b>"), (float("nan"), "nan"), ([4, 0.5], "(4, 0.5)")],
)  # fmt: skip
def test_numbers_as_people_write_them(value, written):
    assert text(value) == written
