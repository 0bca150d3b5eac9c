"""The FID's network and its weights: the published features, and files that are not it."""

import hashlib
import io
import urllib.request

import inception_rule
import jax
import numpy as np
import pytest
import scipy.ndimage

from jetflow.evals import inception
from jetflow.pth import write_pth
from jetflow.types import UsageError


@pytest.fixture(scope="module")
def tensors():
    return inception_rule.tensors()


@pytest.fixture(scope="module")
def golden():
    return inception_rule.golden()


@pytest.mark.parametrize("images", ["images64", "images299"])
def test_features_are_the_published_ones(images, tensors, golden):
    """The first is resized by the network, the second has its size."""
    pooled, spatial = jax.jit(inception.activations)(inception.fold(tensors), golden[images])
    expected = golden[f"{images}_2048"]
    assert np.abs(pooled - expected).max() < 1e-5 * np.abs(expected).max()
    assert spatial.shape == (len(expected), 17, 17, 7) and np.unique(spatial).size > 500


def test_spatial_features_are_of_their_branch(tensors, golden):
    """The first 7 channels of the first convolution of the block Mixed_6d.

    ADM's evaluator names them `mixed_6/conv:0`, where TensorFlow counts from `mixed`, our 5b.
    """
    weights = inception.fold(tensors)
    compute = jax.jit(inception.activations)
    images = golden["images64"][:1]
    _, before = compute(weights, images)
    branch = weights["Mixed_6d.branch1x1"]
    kernel = np.roll(branch["kernel"], 1, axis=-1)
    bias = np.roll(branch["bias"], 1, axis=-1)
    _, after = compute(weights | {"Mixed_6d.branch1x1": {"kernel": kernel, "bias": bias}}, images)
    np.testing.assert_array_equal(after[..., 1:], before[..., :-1])
    assert np.ptp(before) > 0 and (after[..., 0] != before[..., 0]).any()


def resized(image, size):
    """Bilinear between the pixels around i·(size of the image / size), as TensorFlow 1 has it."""
    places = np.meshgrid(
        *(np.arange(size) * length / size for length in image.shape), indexing="ij"
    )
    return scipy.ndimage.map_coordinates(image, places, order=1, mode="nearest")


@pytest.mark.parametrize("shape", [(8, 8), (13, 40), (310, 500)])
def test_resize(shape, monkeypatch):
    monkeypatch.setattr(inception, "SIZE", 31)
    image = np.random.default_rng(0).uniform(0, 255, shape)
    actual = inception.resize(image[None, :, :, None].astype(np.float32))[0, :, :, 0]
    np.testing.assert_allclose(actual, resized(image, 31), atol=0.01)  # float32 positions


def test_gray_is_the_same_in_all_channels(monkeypatch):
    """The network itself would take long."""
    seen = []
    monkeypatch.setattr(inception, "resize", lambda images: seen.append(images) or 1 / 0)
    gray = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), np.uint8)
    with pytest.raises(ZeroDivisionError):
        inception.activations({}, gray)
    np.testing.assert_array_equal(seen[0], np.repeat(gray, 3, axis=3))


def test_weights_know_their_hash(tensors, tmp_path):
    write_pth(tmp_path / "any.pth", tensors)
    found = hashlib.sha256((tmp_path / "any.pth").read_bytes()).hexdigest()
    path = tmp_path / f"weights-{found[:8]}.pth"
    (tmp_path / "any.pth").rename(path)
    network = inception.load(path)
    assert network.sha256 == found and not network.is_published
    assert network.facts()["weights_sha256"] == found

    with open(path, "r+b") as file:  # a flipped bit of a tensor
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UsageError, match=f"damaged: its SHA-256 begins .* says {found[:8]}"):
        inception.load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("Mixed_6b.branch1x1.bn.bias", None, "has no Mixed_6b.branch1x1.bn.bias"),
        ("Mixed_7c.branch1x1.conv.weight", None, "has no Mixed_7c.branch1x1"),
        ("Mixed_7c.branch1x1.conv.weight", np.zeros((7, 2048, 1, 1), np.float32), "other shapes"),
        ("Mixed_6b.branch1x1.bn.bias", np.zeros(3, np.float32), "other shapes"),
    ],
)
def test_weights_of_another_network(name, tensor, message, tensors, tmp_path, monkeypatch):
    changed = {**tensors, name: tensor}
    if tensor is None:
        del changed[name]
    monkeypatch.setattr(inception, "read_pth", lambda path: changed)
    (tmp_path / "weights.pth").write_bytes(b"read by no one")
    with pytest.raises(UsageError, match=message) as caught:
        inception.load(tmp_path / "weights.pth")
    assert inception.NAME in str(caught.value)


def test_missing_weights(tmp_path):
    for path in (tmp_path, tmp_path / "a.pth"):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            inception.load(path)
        assert inception.URL in str(caught.value)


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A function: what the address of the weights gives; in a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offer(answer):
        monkeypatch.setattr(urllib.request, "urlopen", answer)
        return tmp_path / "cache" / "jetflow"

    return offer


def unreachable(*_, **__):
    raise urllib.request.URLError("no route to host")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (unreachable, "no route to host"),
        (lambda *_, **__: io.BytesIO(b"moved"), hashlib.sha256(b"moved").hexdigest()[:8]),
    ],
)
def test_download_that_fails(answer, message, offered):
    cache = offered(answer)
    with pytest.raises(UsageError, match=message) as caught:
        inception.load()
    for part in (
        inception.URL,
        inception.NAME,
        "inception_rule.py",
        "--inception_weights rule.pth",
    ):
        assert part in str(caught.value)
    assert not list(cache.iterdir())


def test_weights_are_downloaded_once(offered, tensors, tmp_path, monkeypatch, capsys):
    write_pth(tmp_path / "published.pth", tensors)
    content = (tmp_path / "published.pth").read_bytes()
    found, asked = hashlib.sha256(content).hexdigest(), []
    monkeypatch.setattr(inception, "PUBLISHED", found[:8])
    monkeypatch.setattr(inception, "NAME", f"weights-{found[:8]}.pth")
    offered(lambda url, **_: asked.append(url) or io.BytesIO(content))
    for _ in range(2):
        network = inception.load()
        assert network.sha256 == found and network.is_published
    assert asked == [inception.URL]
    assert capsys.readouterr().err.count("downloading") == 1
