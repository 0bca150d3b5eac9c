"""Every config that ships builds its run, and is stated in full by configs/base.py."""

from pathlib import Path

import pytest

from jetflow import cli, configs
from jetflow.tools.plan import roofline
from jetflow.training.experiment import set_up

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
    "afhq256_tarflow": ("", ":smoke"),
    "imagenet128_tarflow": ("", ":smoke"),
    "imagenet21k_jet": ("", ":32", ":smoke", ":32,smoke"),
    "imagenet32_jet": ("", ":32x2", ":smoke"),
    "imagenet64_jet": ("", ":64x5", ":smoke"),
    "imagenet64_tarflow": ("", ":unconditional", ":conditional", ":conditional,smoke"),
    "photos_jet": ("", ":8", ":32"),
    "photos_tarflow": ("", ":8", ":32"),
    "transfer_cifar10_jet": ("", ":smoke"),
    "transfer_imagenet64_jet": ("", ":smoke"),
    "transfer_photos": (":pretrain", ":finetune", ":scratch"),
}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "base")


def read(name: str):
    return configs.read(f"{CONFIGS}/{name}")


@pytest.mark.parametrize(
    ("name", "argument"), [(n, argument) for n in NAMES for argument in ARGUMENTS.get(n, ("",))]
)
def test_config_builds(name, argument):
    settings = read(f"{name}.py{argument}")
    run = set_up(settings, roofline.load)
    assert run.total_steps > 0
    if argument and name.startswith("photos"):
        assert settings.data.name == f"photos/{argument[1:]}"
    assert run.trainer.flow.image_shape == run.train_data.image_shape


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_it_is(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert text.startswith('"""') and len(text.split('"""')[1]) > 40


@pytest.mark.parametrize("argument", [":64", ":smoke,64x5x2", ":64x5,32x2"])
def test_unknown_arguments_are_refused(argument, capsys):
    path = f"{CONFIGS}/imagenet64_jet.py{argument}"
    assert cli.main(["train", "--config", path, "--workdir", "runs/x"]) == 2
    assert "expected one of 32x2, 64x5, smoke, or CHOICE,smoke" in capsys.readouterr().err
