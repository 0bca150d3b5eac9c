"""Sweeps: the algebra of grids, points that are measured once, and what a kill leaves."""

import csv
import fcntl
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import html_page
import jax
import numpy as np
import pytest
import tiny_runs

from jetflow import cli, sweeps
from jetflow.cli.commands.sweep import point
from jetflow.sweeps import Sweep, axis, chain, product, together
from jetflow.tools.sweep.folder import Folder
from jetflow.training import loop
from jetflow.types import UsageError

SHIPPED = sorted((tiny_runs.ROOT / "configs" / "sweeps").glob("*.py"))

# Four points of one trained flow, of which each has its own value.
POINTS = '''"""Draws and seeds.

Of the noise.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(axis("draws", [1, 2]), axis("seed", [3, 4])),
        metrics=("noised_bpd",),
        config="../digits_tarflow.py",
        fixed={"batch_size": 64},
        pictures=4,
    )
'''


def values(grid):
    return [{name: one.value for name, one in point.items()} for point in grid.points]


# Grids.


def test_algebra_of_grids():
    a, b = axis("a", [1, 2]), axis("b", {"few": (1,), "many": (1, 2)})
    assert values(product(a, b)) == [
        {"a": 1, "b": (1,)}, {"a": 1, "b": (1, 2)}, {"a": 2, "b": (1,)}, {"a": 2, "b": (1, 2)},
    ]  # fmt: skip
    assert values(together(a, b)) == [{"a": 1, "b": (1,)}, {"a": 2, "b": (1, 2)}]
    assert values(chain(a, axis("c", [0.5]))) == [{"a": 1}, {"a": 2}, {"c": 0.5}]
    assert len(product(a, together(b, axis("c", [3, 4])), axis("d", [1, 2, 3])).points) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: product(axis("a", [1]), axis("a", [2])), "the setting a is on two axes"),
        (lambda: together(axis("a", [1]), axis("b", [2, 3])), r"grids of \[1, 2\] points"),
    ],
)
def test_grids_that_cannot_be(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_names():
    grid = product(axis("config.flow.kinds", {"4:1": ("channels",)}), axis("guidance", [0.5, 2.0]))
    first, second = Sweep(grid, ("bpd",), "x.py").points
    assert first.name == "000,kinds=4%3A1,guidance=0.5"
    assert second.name == "001,kinds=4%3A1,guidance=2"
    assert first.run_name == second.run_name == "kinds=4%3A1"
    labels = ["y" * 500 + end for end in "ab"]
    long = [sweeps.Point(0, {"x": sweeps.Choice(0, label)}, {"x": "x"}).name for label in labels]
    assert long[0] != long[1] and max(map(len, long)) < 150
    tricky = axis("a", {"1,b=2": 0}), product(axis("a", {"1": 1}), axis("b", {"2": 2}))
    first, second = Sweep(chain(*tricky), ("bpd",), "x.py").points
    assert first.name.partition(",")[2] != second.name.partition(",")[2]


def test_names_are_as_short_as_they_can_be_within_a_sweep():
    grid = product(
        axis("config.train.seed", [1]), axis("seed", [2]),
        axis("config.flow.depth", [3]), axis("config.optim.depth", [4]),
        axis("config.optim.lr", [5]),
    )  # fmt: skip
    (only,) = Sweep(grid, ("bpd",), "x.py").points
    trained = ["train.seed=1", "flow.depth=3", "optim.depth=4", "lr=5"]
    assert only.run_name.split(",") == trained
    assert only.name.split(",") == ["000", trained[0], "seed=2", *trained[1:]]


def test_values_of_numpy_are_plain():
    grid = product(axis("step", np.arange(3)), axis("x", {"half": np.float32(0.5)}))
    content = Sweep(grid, ("bpd",), "x.py").content(None, None)
    assert content["points"][2] == {
        "step": {"value": 2, "label": "2"},
        "x": {"value": 0.5, "label": "half"},
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_can_run(path, tmp_path):
    sweep = sweeps.read(str(path))
    point.Runner(sweep, Folder(tmp_path), run=None, data_dir=None).check(on_this_machine=True)
    assert len(sweep.points) >= 4
    assert len(sweep.title) > 20 and sweep.description
    assert not list(tmp_path.iterdir())


# Files and flags.

BAD_FILES = {
    "missing": (None, "is no file"),
    "syntax": ("def get_sweep(:\n", "SyntaxError"),
    "no function": ("x = 1\n", "expected a function get_sweep()"),
    "error": ("def get_sweep():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "nothing": ("def get_sweep():\n    pass\n", "that returns a Sweep with points and metrics"),
    "value twice": (POINTS.replace("[3, 4]", "[3, 3.0]"), "the axis seed has a value twice"),
    "point twice": (
        POINTS.replace("product(", "chain(axis('seed', [3]), ").replace("import", "import chain,"),
        "the points 0 and 3 are the same",
    ),
    "label twice": (
        POINTS.replace("product(", "chain(axis('seed', {'3': 5}), ").replace(
            "import", "import chain,"
        ),
        "seed has the values 5 and 3 under the label 3",
    ),
    "no such repeats": (POINTS.replace("pictures=4", "repeats=('step',)"), "repeats has step"),
    "no value of a field": (
        POINTS.replace('"draws", [1, 2]', '"config.optim.lr", [None]'),
        "config.optim.lr is None",
    ),
    "unknown flag": (POINTS.replace('"seed"', '"sead"'), "did you mean seed?"),
    "the sweep's own": (POINTS.replace('"seed"', '"num"'), "num cannot be set"),
    "neither config nor run": (
        POINTS.replace("config=", "title="),
        "the sweep has no config to train; give the run to measure by --run",
    ),
    "unknown metric": (POINTS.replace("noised_bpd", "fit"), "--metrics has 'fit'"),
    "wrong type": (POINTS.replace("[1, 2]", "['all']"), "--draws is 'all'"),
    "unknown field": (POINTS.replace('"draws"', '"config.optim.rate"'), "config.optim.rate"),
    "no config": (POINTS.replace("digits_tarflow", "digits"), "digits.py' is no file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_sweeps(case, tmp_path, capsys):
    content, message = BAD_FILES[case]
    path = tmp_path / "sweep.py"
    if content is not None:
        configs = f'config="{tiny_runs.ROOT}/configs/'
        path.write_text(content.replace('config="../', configs))
    workdir = tmp_path / "swept"
    assert cli.main(["sweep", "--sweep", str(path), "--workdir", str(workdir)]) == 2
    assert message in capsys.readouterr().err
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point=4"], "--point is 4; expected 0 to 3"),
        (["--shard=2/2"], "--shard is '2/2'; expected I/N"),
        (["--shard=1"], "--shard is '1'"),
        (["--fix=draws"], "expected NAME=VALUE"),
        (["--fix=draws=3"], "draws, which is swept"),
        (["--fix=nothing=3"], "nothing is no flag"),
    ],
)
def test_bad_flags(arguments, message, sweep, capsys):
    assert sweep(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_has_its_training_behind_it(sweep, capsys):
    sweep.path.write_text(sweep.path.read_text().replace('"draws"', '"config.train.seed"'))
    assert sweep() == 2
    assert "config.train.seed is swept, so --run cannot be given" in capsys.readouterr().err


# Sweeps of a trained flow.


class Swept:
    """Runs a sweep of a trained flow; `workdir` is its folder."""

    def __init__(self, path: Path, run: Path, workdir: Path):
        self.path, self.run, self.workdir = path, run, workdir

    def arguments(self, *more: str) -> list[str]:
        given = {"sweep": self.path, "workdir": self.workdir, "run": self.run}
        return ["sweep", *(f"--{name}={value}" for name, value in given.items()), *more]

    def __call__(self, *more: str) -> int:
        return cli.main(self.arguments(*more))

    def records(self) -> list[dict]:
        return Folder(self.workdir).records()


@pytest.fixture
def sweep(trained, tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(POINTS.replace("../", f"{tiny_runs.ROOT}/configs/"))
    return Swept(path, trained("tarflow"), tmp_path / "swept")


def table(workdir, capsys) -> str:
    """What a sweep has found, unrounded."""
    capsys.readouterr()
    assert cli.main(["report", str(workdir), "--format=csv"]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    """The folder of the sweep, measured in one go."""
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "sweep.py"
    path.write_text(POINTS.replace("../", f"{tiny_runs.ROOT}/configs/"))
    swept = Swept(path, trained("tarflow"), folder / "swept")
    with pytest.MonkeyPatch.context() as patch:
        loads = []
        load = point.load_model
        patch.setattr(point, "load_model", lambda *args: loads.append(args) or load(*args))
        assert swept() == 0
    assert len(loads) == 1, "the model of all points is loaded once"
    return swept.workdir


def test_a_sweep_measures_all_points(uninterrupted, capsys):
    rows = list(csv.DictReader(table(uninterrupted, capsys).splitlines()))
    assert [(row["draws"], row["seed"]) for row in rows] == [
        ("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")
    ]  # fmt: skip
    found = {float(row["noised_bpd"]) for row in rows}
    assert len(found) == 4 and all(1 < value < 10 for value in found)
    assert all(row["status"] == "done" for row in rows)
    pictures = sorted(path.name for path in uninterrupted.glob("points/*.png"))
    assert pictures == [f"{i:03d},draws={1 + i // 2},seed={3 + i % 2}.png" for i in range(4)]
    page = html_page.read((uninterrupted / "report.html").read_text())
    assert "4 of 4 points measured" in page.text and page.tags["img"] == 4
    assert "155e0069c5c5089c" in page.text  # the data's checksum
    assert page.marked[0][1] == f"{min(found):.4g}"


def test_a_sweep_goes_on_where_it_stopped(sweep, uninterrupted, monkeypatch, capsys):
    """Interrupted within the second point, it measures what is missing and ends the same."""
    measure, seen = point._say_all, []

    def interrupt(model, options):
        seen.append((options.draws, options.seed))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(model, options)

    monkeypatch.setattr(point, "_say_all", interrupt)
    assert sweep() == 130
    assert [record["number"] for record in sweep.records()] == [0]
    assert sweep() == 0
    assert seen == [(1, 3), (1, 4), (1, 4), (2, 3), (2, 4)]
    assert table(sweep.workdir, capsys) == table(uninterrupted, capsys)
    assert sweep() == 0
    assert len(seen) == 5


def test_failures_are_recorded_and_the_rest_goes_on(sweep, uninterrupted, monkeypatch, capsys):
    measure = point._say_all

    def fail(model, options):
        if options.seed == 4:
            raise (UsageError if options.draws == 1 else RuntimeError)("no luck")
        return measure(model, options)

    with monkeypatch.context() as patch:
        patch.setattr(point, "_say_all", fail)
        assert sweep() == 1
    failed = {r["number"]: r["error"] for r in sweep.records() if r["status"] == "failed"}
    assert failed == {1: "no luck", 3: "RuntimeError: no luck"}
    captured = capsys.readouterr()
    assert "failed: 2 of 4 points" in captured.err and "failed" in captured.out
    assert "no luck" in html_page.read((sweep.workdir / "report.html").read_text()).text
    assert sweep() == 0
    assert table(sweep.workdir, capsys) == table(uninterrupted, capsys)


def test_shards_and_printed_commands_cover_the_sweep(sweep, uninterrupted, capsys):
    assert sweep("--shard=1/2") == 0
    assert [record["number"] for record in sweep.records()] == [1, 3]
    capsys.readouterr()
    assert sweep("--shard=0/2", "--print") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[:2] for command in commands] == [["jetflow", "sweep"]] * 2
    assert len(sweep.records()) == 2
    for command in commands:
        assert cli.main(command[1:]) == 0
    assert table(sweep.workdir, capsys) == table(uninterrupted, capsys)


def test_commands_are_printed_for_another_machine(sweep, capsys):
    assert sweep("--fix=mesh=data=64") == 2
    assert sweep("--fix=mesh=data=64", "--print") == 0
    assert capsys.readouterr().out.count("--fix=mesh=data=64") == 4
    assert not sweep.workdir.exists()


def test_none_is_the_default_of_a_flag(sweep):
    sweep.path.write_text(sweep.path.read_text().replace("[1, 2]", "[1, None]"))
    assert sweep("--point=2") == 0
    (record,) = sweep.records()
    assert record["settings"]["draws"] == "None" and record["results"][0]["draws"] == 2


def test_a_point_that_another_process_is_at_is_left_to_it(sweep, capsys):
    name = "001,draws=1,seed=4"
    (sweep.workdir / "locks").mkdir(parents=True)
    with open(sweep.workdir / "locks" / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep("--shard=0/1", "--fix=batch_size=64") == 0
    assert [record["number"] for record in sweep.records()] == [0, 2, 3]
    assert "other processes are at 1 points" in capsys.readouterr().err


def test_a_folder_holds_one_sweep(sweep, capsys):
    assert sweep("--point=0") == 0
    before = (sweep.workdir / "sweep.json").read_bytes()
    for more, message in (
        (["--fix=split=train"], "fixed.split is None there and train here"),
        ([], "its points are others"),
    ):
        if not more:
            sweep.path.write_text(sweep.path.read_text().replace("[3, 4]", "[4, 3]"))
        assert sweep(*more) == 2
        assert f"{sweep.workdir} holds another sweep" in (error := capsys.readouterr().err)
        assert message in error
    assert (sweep.workdir / "sweep.json").read_bytes() == before
    # More points may come after those that there are.
    text = sweep.path.read_text().replace("[4, 3]", "[3, 4]").replace("[1, 2]", "[1, 2, 3]")
    sweep.path.write_text(text)
    assert sweep("--point=5") == 0
    assert [record["number"] for record in sweep.records()] == [0, 5]


def test_all_points_measure_one_checkpoint(sweep, tmp_path, capsys):
    """Also where the run is trained on in between, and not where that one is gone."""
    sweep.run = shutil.copytree(sweep.run, tmp_path / "run")
    checkpoints = sweep.run / "checkpoints"
    shutil.move(checkpoints / "12", tmp_path / "12")
    assert sweep("--point=0") == 0
    shutil.move(tmp_path / "12", checkpoints / "12")
    assert sweep("--point=1") == 0
    assert [record["step"] for record in sweep.records()] == [10, 10]
    shutil.rmtree(checkpoints / "10")
    assert sweep("--point=2") == 2
    assert "no checkpoint of step 10" in capsys.readouterr().err
    assert len(sweep.records()) == 2


# Sweeps that train.


def training_sweep(tmp_path: Path) -> Path:
    """Two trainings of a tiny Jet, each measured twice."""
    _, fields = tiny_runs.FLOWS["jet"]
    fixed = {f"config.{name}": value for name, value in fields.items()}
    path = tmp_path / "sweep.py"
    path.write_text(
        '"""Two nets."""\n\nfrom jetflow.sweeps import Sweep, axis, product\n\n\n'
        "def get_sweep():\n"
        "    grid = product(axis('config.flow.net', ['vit', 'conv']), axis('seed', [0, 1]))\n"
        f"    config = '{tiny_runs.ROOT}/configs/photos_jet.py'\n"
        f"    return Sweep(grid, ('bpd',), config, fixed={fixed!r}, pictures=4)\n"
    )
    return path


def test_a_sweep_trains_each_run_once(tmp_path, capsys, compilation_cache):
    path, workdir = training_sweep(tmp_path), tmp_path / "swept"
    assert cli.main(["sweep", "--sweep", str(path), "--workdir", str(workdir)]) == 0
    assert sorted(run.name for run in (workdir / "runs").iterdir()) == ["net=conv", "net=vit"]
    assert capsys.readouterr().err.count("done: step 12") == 2
    rows = list(csv.DictReader(table(workdir, capsys).splitlines()))
    assert [row["config.flow.net"] for row in rows] == ["vit", "vit", "conv", "conv"]
    assert len({row["bpd"] for row in rows}) == 4
    assert rows[0]["parameters"] != rows[2]["parameters"]
    page = html_page.read((workdir / "report.html").read_text())
    assert "Where the configs of the runs differ" in page.text and "flow.net" in page.text
    assert cli.main(["report", str(workdir / "runs" / "net=vit")]) == 0


def test_a_folder_is_that_of_a_sweep_before_it_has_points(tmp_path):
    folder = Folder(tmp_path)
    content = Sweep(axis("a", [1]), ("bpd",), "x.py").content(None, None)
    folder.open(content)
    folder.open(content | {"title": "Another title"})
    with pytest.raises(UsageError, match="was begun without --run; go on so"):
        folder.open(content | {"run": "r"})


def test_a_sweep_and_a_run_share_no_folder(sweep, tmp_path, capsys):
    run = tmp_path / "a run"
    assert tiny_runs.train("tarflow", run, train__steps=1) == 0
    assert sweep("--point=0") == 0
    before = set(run.rglob("*"))
    assert sweep(f"--workdir={run}") == 2
    assert f"{run} holds a run; give the sweep a --workdir of its own" in capsys.readouterr().err
    assert tiny_runs.train("tarflow", sweep.workdir, train__steps=1) == 2
    assert f"{sweep.workdir} holds a sweep" in capsys.readouterr().err
    assert set(run.rglob("*")) == before
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "neither a run nor a sweep; give one that is in it: a run" in capsys.readouterr().err


def diverging(*_, **options):
    raise loop.Diverged("the training diverged")


def test_an_edited_config_is_another_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train", diverging)
    monkeypatch.chdir(tiny_runs.ROOT)
    config, path, workdir = tmp_path / "recipe.py", training_sweep(tmp_path), tmp_path / "swept"
    path.write_text(re.sub(r"'\S+photos_jet.py'", f"'{config}'", path.read_text()))
    recipe = (
        "from configs import photos_jet\n\n\ndef get_config():\n"
        "    config = photos_jet.get_config()\n    config.optim.b2 = 0.9\n    return config\n"
    )
    config.write_text(recipe)
    arguments = ["sweep", "--sweep", str(path), "--workdir", str(workdir), "--point=0"]
    assert cli.main(arguments) == 1
    config.write_text(recipe.replace("0.9", "0.8"))
    assert cli.main(arguments) == 2
    assert "recipe.optim.b2 is 0.9 there and 0.8 here" in capsys.readouterr().err


def test_a_failed_training_is_tried_once_a_command(tmp_path, monkeypatch, capsys):
    tried = []

    def train(config, workdir, **options):
        tried.append(workdir.name)
        raise loop.Diverged("the training diverged")

    monkeypatch.setattr(loop, "train", train)
    path, workdir = training_sweep(tmp_path), tmp_path / "swept"
    for count in (1, 2):
        assert cli.main(["sweep", "--sweep", str(path), "--workdir", str(workdir)]) == 1
        assert tried == ["net=vit", "net=conv"] * count
    assert ["diverged" in record["error"] for record in Folder(workdir).records()] == [True] * 4


@pytest.mark.parametrize("error", [UsageError, RuntimeError])
def test_a_failure_ends_processes_that_are_joined(error, sweep, monkeypatch):
    """Others may wait for the one that failed; `hosts.joined` ends them."""

    def fail(*_):
        raise error("no luck")

    monkeypatch.setattr(point.Runner, "_measure", fail)
    folder, swept = Folder(sweep.workdir), sweeps.read(str(sweep.path))
    runner = point.Runner(swept, folder, run=str(sweep.run), data_dir=None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(error, match="no luck"):
        runner.go(swept.points[0])
    assert not folder.records()


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table(tmp_path, capsys, compilation_cache):
    """A kill in the first training, and one between two points."""
    path = training_sweep(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["sweep", "--sweep", str(path), "--workdir"]
    assert cli.main([*arguments, str(whole)]) == 0
    for reached in ("runs/net=vit/checkpoints/5", "points/000,net=vit,seed=0.json"):
        process = tiny_runs.start([*arguments, str(killed)])
        deadline = time.monotonic() + 180
        while not (killed / reached).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = {r["name"]: r["seconds"] for r in Folder(killed).records()}
    assert 0 < len(done) < 4
    process = tiny_runs.start([*arguments, str(killed)])
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    after = {record["name"]: record["seconds"] for record in Folder(killed).records()}
    assert done.items() <= after.items(), "a point was measured twice"
    assert table(killed, capsys) == table(whole, capsys)
