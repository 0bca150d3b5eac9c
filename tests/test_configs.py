"""Every config that ships builds its run, and is stated in full by configs/base.py."""

from pathlib import Path

import pytest
from absl import flags

from jetflow import config, plan
from jetflow.run import set_up

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
    "imagenet64_jet": ("", ":64x5"),
    "photos_jet": ("", ":8", ":32"),
    "photos_tarflow": ("", ":8", ":32"),
    "transfer_photos": (":pretrain", ":finetune", ":scratch"),
}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "base")


def read(name: str):
    values = flags.FlagValues()
    argv = ["train", f"--config={CONFIGS}/{name}"]
    config.define(values, argv)
    assert config.parse(values, argv) == []
    return values.config


@pytest.mark.parametrize(
    ("name", "argument"), [(n, argument) for n in NAMES for argument in ARGUMENTS.get(n, ("",))]
)
def test_config_builds(name, argument):
    settings = read(f"{name}.py{argument}")
    run = set_up(settings, plan.load)
    assert run.total_steps > 0
    if argument and name.startswith("photos"):
        assert settings.data.name == f"photos/{argument[1:]}"
    assert run.trainer.flow.image_shape == run.train_data.image_shape


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_it_is(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert text.startswith('"""') and len(text.split('"""')[1]) > 40
