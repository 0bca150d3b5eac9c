"""Bad command lines: each ends with status 2 and one line that says why, and writes nothing."""

import re
import resource
import shlex
from pathlib import Path

import pytest
import tiny_runs

from jetflow import cli
from jetflow.data import dataset

pytestmark = pytest.mark.usefixtures("compilation_cache")

MOST_MEMORY = 500_000  # KiB that a line may add to the process

# Files of the folder in which the lines run, beside a file `file` and a folder `folder`.
TINY = """
from configs import base

def get_config():
    config = base.for_samples(base.tarflow(), noise_std=0.1)
    config.flow.width = config.flow.head_dim = 16
    config.flow.num_blocks = 2
    config.flow.layers_per_block = (1,)
    config.train.steps = 4
    return config
"""
SWEEP = """
from jetflow.sweeps import Sweep, axis, chain, product, together

def get_sweep():
    return Sweep(axis("draws", [1, 2]), metrics=("bpd",), config="tiny.py")
"""
FILES = {
    "tiny.py": TINY,
    "jet.py": TINY.replace("for_samples(base.tarflow(), noise_std=0.1)", "jet()")
    .replace("config.flow.head_dim = 16", "16")
    .replace("num_blocks", "num_couplings")
    .replace("layers_per_block = (1,)", "num_heads = 2"),
    "syntax.py": "def get_config(:\n",
    "imports.py": "import missing_module\n",
    "type.py": TINY.replace("steps = 4", "steps = 'many'"),
    "misspelt.py": TINY.replace("steps = 4", "stpes = 4"),
    "nothing.py": TINY.replace("return config", ""),
    "no_function.py": "x = 1\n",
    "no_section.py": TINY.replace("return", "config.unlock(); del config.optim; return"),
    "no_field.py": TINY.replace("return", "config.unlock(); del config.train.seed; return"),
    "exits.py": "import sys\ndef get_config():\n    sys.exit('enough\\nof this')\n",
    "raises.py": "def get_config():\n    raise ValueError('several\\nlines')\n",
    "recursion.py": "def get_config():\n    return get_config()\n",
    "argument.py": TINY.replace("get_config()", "get_config(size)"),
    "sweep.py": SWEEP,
    "sweep_syntax.py": "def get_sweep(:\n",
    "sweep_error.py": SWEEP.replace("return", "1 / 0\n    return"),
    "sweep_nothing.py": SWEEP.replace("return", ""),
    "sweep_exits.py": "import sys\ndef get_sweep():\n    sys.exit()\n",
    "sweep_grid.py": SWEEP.replace('axis("draws", [1, 2])', "[1, 2]"),
    "sweep_repeats.py": SWEEP.replace("metrics", "repeats=('step',), metrics"),
    "sweep_option.py": SWEEP.replace("draws", "drawss"),
    "sweep_own.py": SWEEP.replace("draws", "make_reference"),
    "sweep_config.py": SWEEP.replace("tiny", "digits"),
    "sweep_neither.py": SWEEP.replace(', config="tiny.py"', ""),
    "sweep_metric.py": SWEEP.replace('"bpd"', '"fit"'),
    "sweep_range.py": SWEEP.replace("[1, 2]", "[0, 1]"),
    "sweep_field.py": SWEEP.replace("draws", "config.optim.rate"),
    "sweep_rules.py": SWEEP.replace("draws", "config.mesh.rules"),
    "sweep_training.py": SWEEP.replace("draws", "config.train.seed"),
    "sweep_twice.py": SWEEP.replace(
        'axis("draws", [1, 2])', "chain(axis('seed', [1]), axis('seed', {'1': 2}))"
    ),
}

# Command lines and a part of the message: the name of what is wrong, what came, or the remedy.
# JET, TARFLOW and PLAIN are trained runs, the last one without labels; LONG is a long name.
TABLE = r"""
trian                                             'trian' is no command
--workdir x                                       '--workdir' is no command

train --workdir new                               --config is missing
train --config tiny.py                            --workdir is missing
train --config.train.steps=3 --workdir new        give --config FILE.py
train --config tiny.py --train 3 --workdir new    --config.train.
train --config tiny.py --workdir new y            unexpected argument 'y'
train --config tiny.py --workdir new --extend=x   extend
train --config tiny.py --workdir new --noextend=3  noextend
train --config tiny.py --workdir file/x           file/x
train --config tiny.py --workdir file             file is a file; give a folder
train --config tiny.py --workdir LONG             --workdir is
train --config tiny.py --workdir ''               --workdir is ''; expected a path
train --config tiny.py --workdir ~nobody_of_us/x  ~nobody_of_us
train --config tiny --workdir new                 did you mean tiny.py?
train --config '' --workdir new                   '' is no file
train --config folder --workdir new               'folder' is no file
train --config tiny.py:16 --workdir new           takes no argument; leave out :16
train --config argument.py --workdir new          takes an argument; give one as
train --config syntax.py --workdir new            syntax.py, line 1: SyntaxError
train --config imports.py --workdir new           line 1: ModuleNotFoundError
train --config type.py --workdir new              line 9: TypeError
train --config misspelt.py --workdir new          line 9: AttributeError
train --config nothing.py --workdir new           returns no config
train --config no_function.py --workdir new       no function get_config
train --config no_section.py --workdir new        no section optim
train --config no_field.py --workdir new          config.train.seed is None
train --config exits.py --workdir new             line 3: SystemExit: enough of this
train --config raises.py --workdir new            line 2: ValueError: several lines
train --config recursion.py --workdir new         line 2: RecursionError

TRAIN --config.train.stpes=3                      did you mean steps?
TRAIN --config.trian.steps=3                      did you mean train?
TRAIN --config.defaults.train.steps=3             config.defaults.train.steps is no field
TRAIN --config.mesh=3                             expected the name of a field after it
TRAIN --config.train.steps=1.5                    config.train.steps is '1.5'; expected a whole
TRAIN --config.train.steps=9223372036854775808    config.train.steps is 9223372036854775808
TRAIN --config.train.steps=0                      all are 0; set one
TRAIN --config.train.epochs=3                     got steps=4, epochs=3; set the others to 0
TRAIN --config.train.batch_size=0                 config.train.batch_size is 0
TRAIN --config.train.batch_size=99999999999       config.train.batch_size is 99999999999
TRAIN --config.train.accumulation=3               64 is not divisible by config.train.accumulation 3
TRAIN --config.train.seed=4294967296              config.train.seed is 4294967296
TRAIN --config.train.ema_decay=1                  config.train.ema_decay is 1.0
TRAIN --config.optim.lr=high                      config.optim.lr is 'high'; expected a number
TRAIN --config.optim.lr=inf                       config.optim.lr is inf
TRAIN --config.optim.multipliers=5                config.optim.multipliers has 5
TRAIN --config.data.name=digist                   config.data.name is 'digist'
TRAIN --config.data.train_split=validation        'validation' is not a split
TRAIN --config.data.labels=maybe                  config.data.labels is 'maybe'; expected true
TRAIN --config.data.workers=9999                  config.data.workers is 9999
TRAIN --config.noise.kind=uniform                 config.noise.std is 0.1 with uniform noise
TRAIN --config.noise.std=nan                      config.noise.std is nan
TRAIN --config.noise.label_drop=0.2               config.noise.label_drop is 0.2
TRAIN --config.eval.guidance=1                    config.eval.guidance of a flow without labels
TRAIN --config.eval.temperature=nan               config.eval.temperature is nan
TRAIN --config.init_from=empty                    no run in empty
TRAIN --config.init_from=LONG                     config.init_from is
TRAIN --config.flow.kind=glow                     config.flow.kind is 'glow'
TRAIN --config.flow.kind=jet                      is no field of a jet
TRAIN --config.flow.patch_size=3                  image height 8 is not divisible by patch 3
TRAIN --config.flow.num_blocks=100000000          config.flow.num_blocks is 100000000
TRAIN --config.flow.layers_per_block=(1,2,3)      has 3 entries for 2 blocks
TRAIN --config.flow.layers_per_block=(1,0)        config.flow.layers_per_block is 0
TRAIN --config.flow.layers_per_block=(((          config.flow.layers_per_block is '((('
TRAIN --config.flow.width=1048576                 make config.flow smaller
TRAIN --config.mesh.fsdp=2                        fsdp=2, tensor=1, but there are 1 devices
TRAIN --config.mesh.rules=5                       config.mesh.rules has 5
TRAIN --config.mesh.rules=(1,)                    config.mesh.rules has 1
TRAIN --config.mesh.rules="(('a','b','c'),)"      config.mesh.rules has ('a', 'b', 'c')
TRAIN --config.mesh.rules="(('a','b'),)"          config.mesh.rules has ('a', 'b')
TRAIN --config.mesh.rules="(('(','fsdp'),)"       config.mesh.rules has ('(', 'fsdp')
train --config jet.py --workdir new --config.flow.layers_per_block=3  configs/base.py lists them
train --config jet.py --workdir new --config.flow.kinds=(channels  expected values in brackets
train --config jet.py --workdir new --config.flow.kinds=5  config.flow.kinds is 5
train --config jet.py --workdir new --config.flow.num_heads=3  not divisible by num_heads 3
train --config jet.py --workdir new --config.eval.denoise  config.eval.denoise needs a

sample                                            --workdir is missing
sample --workdirr x                               did you mean --workdir?
sample --workdir                                  workdir
sample --workdir empty                            no run in empty
sample --workdir JET --num all                    --num is 'all'; expected a whole number
sample --workdir JET --num 0                      --num is 0
sample --workdir JET --num 99999999999999         --num is 99999999999999
sample --workdir JET --batch_size 99999999999     --batch_size is 99999999999
sample --workdir JET --step 7                     no checkpoint of step 7
sample --workdir JET --step -1                    --step is -1
sample --workdir JET --guidance 1                 guidance is 1.0, but needs a TarFlow
sample --workdir JET --denoise                    gaussian
sample --workdir TARFLOW --window 8               window is 8, which has no effect with
sample --workdir TARFLOW --method auto --window 8  no effect with method auto
sample --workdir JET --method jacobi              Jet is inverted in one pass
sample --workdir TARFLOW --temperature nan        --temperature is nan
sample --workdir TARFLOW --denoise_std 1          add denoise
sample --workdir TARFLOW --label 10               label 10 is out of range; expected 0 to 9
sample --workdir TARFLOW --seed -1                --seed is -1
sample --workdir TARFLOW --mesh data=2            --mesh has data=2
sample --workdir TARFLOW --mesh ''                --mesh is empty
sample --workdir TARFLOW --out file/x.png         --out file/x.png cannot be written
sample --workdir TARFLOW --out x.jpg              --out is x.jpg; expected NAME.png
sample --workdir TARFLOW --npz grid.png           expected NAME.png
sample --workdir TARFLOW --images a.png           --images has no effect
sample --workdir TARFLOW --mode reconstruct --images file  images has file
sample --workdir TARFLOW --mode interpolate --images file  interpolate needs two
sample --workdir TARFLOW --mode reconstruct --guidance 2  --guidance has no effect
sample --workdir TARFLOW --mode interpolate --guidance 2  the images have no labels
sample --workdir TARFLOW --npz /dev/null/x        /dev/null/x
sample --workdir TARFLOW --mesh data:2            --mesh has 'data:2'; expected AXIS=SIZE
sample --workdir PLAIN --denoise                  denoise needs a flow trained with gaussian noise
sample --workdir PLAIN --label 1                  trained without labels

evaluate --workdir empty                          no run in empty
evaluate --workdir JET --metrics fidd             --metrics is 'fidd'
evaluate --workdir JET --metrics ''               --metrics is empty
evaluate --workdir JET --metrics noised_bpd       noised_bpd is for flows trained with gaussian
evaluate --workdir JET --levels 0.1               for flows trained with noise of all levels
evaluate --workdir JET --split validation         'validation' is not a split
evaluate --workdir JET --split ''                 --split is ''
evaluate --workdir JET --mesh fsdp:4              --mesh has 'fsdp:4'; expected AXIS=SIZE
evaluate --workdir JET --draws 0                  --draws is 0
evaluate --workdir PLAIN --metrics accuracy       flows with labels
evaluate --workdir TARFLOW --make_reference --reference folder  --reference folder cannot be

sweep --workdir new                               --sweep is missing
sweep --sweep empty.py --workdir new              'empty.py' is no file
sweep --sweep sweep_syntax.py --workdir new       SyntaxError
sweep --sweep sweep_error.py --workdir new        line 5: ZeroDivisionError
sweep --sweep sweep_nothing.py --workdir new      returns no Sweep
sweep --sweep sweep_exits.py --workdir new        line 3: SystemExit
sweep --sweep sweep_grid.py --workdir new         grid
sweep --sweep sweep_repeats.py --workdir new      repeats has step
sweep --sweep sweep_option.py --workdir new       did you mean draws?
sweep --sweep sweep_own.py --workdir new          make_reference is no option
sweep --sweep sweep_config.py --workdir new       digits.py' is no file
sweep --sweep sweep_neither.py --workdir new      no config to train
sweep --sweep sweep_metric.py --workdir new       metrics is 'fit'
sweep --sweep sweep_range.py --workdir new        draws is 0
sweep --sweep sweep_field.py --workdir new        config.optim.rate is no field
sweep --sweep sweep_rules.py --workdir new        config.mesh.rules has 1
sweep --sweep sweep_twice.py --workdir new        under the label 1
sweep --sweep sweep_training.py --workdir new --run TARFLOW  a setting of the training
sweep --sweep sweep.py --workdir new --run empty  no run in
sweep --sweep sweep.py --workdir new --point 4    point is 4; expected 0 to 1
sweep --sweep sweep.py --workdir new --shard 1    --shard is '1'
sweep --sweep sweep.py --workdir new --shard 2/2  shard is 2/2
sweep --sweep sweep.py --workdir new --fix draws  --fix has 'draws'; expected NAME=VALUE
sweep --sweep sweep.py --workdir new --fix draws=3  draws, which is swept
sweep --sweep sweep.py --workdir new --fix nothing=3  nothing is no option
sweep --sweep sweep.py --workdir new --fix temperature=hot  temperature is 'hot'; expected a
sweep --sweep sweep.py --workdir file             file is a file; give a folder
sweep --sweep sweep.py --workdir TARFLOW          holds a run

report                                            DIR is missing
report empty                                      empty is no folder
report folder                                     no run in folder
report TARFLOW --format pdf                       --format is 'pdf'
report TARFLOW --out folder                       --out folder cannot be written

plan --config tiny.py                             --topology is missing
plan --config tiny.py --topology v9:2x2           16x16x24; v5e:1x1 2x2 2x4 4x4 4x8
plan --config tiny.py --topology v5p:3x3x3        v5p:2x2x1
plan --config tiny.py --topology v5e:2x2 --slices=0  --slices is 0
plan --config tiny.py --topology v5e:2x2 --what=swim  --what is 'swim'; expected one of train
plan --config tiny.py --topology v5e:2x2 --window=3  --window is 3, which has no effect
plan --config tiny.py --topology v5e:2x2 --cache_dtype=int8  no effect without --what sample
plan --config tiny.py --topology v5e:2x2 --what=sample --sweeps=0.5  without --method jacobi
plan --config tiny.py --topology v5e:2x2 --fit --config.train.accumulation=0  accumulation is 0

bench                                             expected jetflow bench followed by one of
bench sampling                                    expected jetflow bench followed by one of
bench train                                       --config is missing
bench train --config tiny.py --workers 2          --workers is no flag of jetflow bench train
bench train --config tiny.py --steps 0            --steps is 0
bench data --config tiny.py --workers two         --workers is 'two'; expected a whole number
bench data --config tiny.py --workers ''          --workers is empty
bench data --config tiny.py --workers 99999999    --workers is 99999999
bench data --config tiny.py --config.train.batch_size=-1  config.train.batch_size is -1
bench sample                                      give --workdir runs/NAME of a trained flow, or
bench sample --workdir JET --methods fast         --methods is 'fast'; expected one of cached
bench sample --workdir JET --batch_sizes 0        --batch_sizes is 0
bench sample --config tiny.py --step 3            --step has no effect
bench sample --config tiny.py                     give a trained flow

convert                                           expected jetflow convert followed by one of
convert tarflow                                   SOURCE is missing
convert tarflow file --out new                    --image_size is missing
convert tarflow file --out new SIZES --noise_std nan  std is nan
convert tarflow file --out new SIZES --noise_std 0  file
convert jet file --out new --image_shape 8,8,1 --patch_size 4 --num_heads 2 --kinds x  --kinds is
convert --reverse tarflow JET --out x.pth         only a TarFlow
convert --reverse tarflow TARFLOW --out file      file exists

prepare                                           DATASET is missing
prepare digist                                    digist
prepare --dataset digits                          --dataset is no flag
prepare digits --workers 0                        --workers is 0
prepare cifar10 --manual_dir empty                cifar-10-python.tar.gz
"""
WORDS = {
    "TRAIN": "train --config tiny.py --workdir new",
    "SIZES": "--image_size 8 --channels 1 --patch_size 2",
    "LONG": "w" * 300,
}
RUNS = {"JET": "jet", "TARFLOW": "tarflow", "PLAIN": "volume preserving"}
REFUSED = [re.split(r"  +", line, maxsplit=1) for line in TABLE.splitlines() if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_dir):
    """The folder in which the lines run; data is prepared, as no line is to say that it is."""
    dataset.load("digits", "test")
    folder = tmp_path_factory.mktemp("refused")
    (folder / "folder").mkdir()
    for name, text in {**FILES, "file": "x"}.items():
        (folder / name).write_text(text)
    return folder


def written(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refused(line, message, place, trained, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(tiny_runs.ROOT))
    folders = [place, *(trained(RUNS[word]) for word in shlex.split(line) if word in RUNS)]
    words = {
        **WORDS,
        **{name: shlex.quote(str(trained(run))) for name, run in RUNS.items() if name in line},
    }
    for name, text in words.items():
        line = re.sub(rf"\b{name}\b", text, line)
    before, memory = [*map(written, folders)], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capsys.readouterr()
    assert cli.main(shlex.split(line)) == 2
    printed = capsys.readouterr()
    (said,) = printed.err.splitlines()
    assert message in said and len(said) < 2000 and printed.out == ""
    assert [*map(written, folders)] == before
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert added < MOST_MEMORY, f"the line took {added} KiB of memory"
