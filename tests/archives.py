"""Small archives of exactly the published layouts, with the awkward files that real ones have."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

SYNSETS = ("n01440764", "n01443537", "n02119789")
# How the devkit numbers them: not in their order.
ILSVRC_IDS = {"n02119789": 1, "n01440764": 2, "n01443537": 3}


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: smooth, so that JPEG keeps it, and no two alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed: int, width: int = 80, height: int = 60) -> bytes:
    return encoded(picture(seed, width, height), "JPEG", quality=95)


def rotated_jpeg(seed: int, width: int, height: int) -> bytes:
    """Lies on its side, and its EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(seed, width, height), "JPEG", quality=95, exif=exif)


def awkward(seed: int, width: int = 80, height: int = 60) -> dict[str, bytes]:
    """Readable files of every kind, by what is odd in them."""
    rgb = Image.fromarray(picture(seed, width, height))
    wide = rgb.convert("L").point(lambda v: v * 257, "I").convert("I;16")
    return {
        "grey": encoded(rgb.convert("L"), "JPEG"),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "palette": encoded(rgb.quantize(16), "GIF"),
        "16-bit": encoded(wide, "PNG"),
        "transparent": encoded(rgb.convert("RGBA"), "PNG"),
        "rotated": rotated_jpeg(seed, width, height),
        "PNG by another name": encoded(rgb, "PNG"),
        "small": jpeg(seed, 20, 17),
    }


def unreadable(seed: int) -> dict[str, bytes]:
    return {
        "truncated": jpeg(seed)[:-400],
        "zero bytes": b"",
        "text": b"<html>404</html>",
        "half a PNG": encoded(picture(seed, 80, 60), "PNG")[:500],
    }


def tar_of(files: dict[str, bytes], path: Path | None = None) -> bytes:
    """A tar, also written to a path if there is one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if path:
        path.write_bytes(file.getvalue())
    return file.getvalue()


def gzip_tar(files: dict[str, bytes], path: Path) -> None:
    path.write_bytes(gzip.compress(tar_of(files)))


def zip_of(files: dict[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def old_imagenet(folder: Path, size: int, train: int = 30, validation: int = 8) -> np.ndarray:
    """train_SxS.tar and valid_SxS.tar; gives the pixels of both, in order."""
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (train + validation, size, size, 3), dtype=np.uint8)
    files = [encoded(image, "PNG") for image in pixels]
    for split, some in (("train", files[:train]), ("valid", files[train:])):
        names = [f"{split}_{size}x{size}/{number:07d}.png" for number in range(1, len(some) + 1)]
        tar_of(dict(zip(names, some, strict=True)), folder / f"{split}_{size}x{size}.tar")
    return pixels


def _batch(pixels: np.ndarray, labels: np.ndarray, kind: str) -> bytes:
    rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)
    if kind == "npz":
        file = io.BytesIO()
        np.savez_compressed(file, data=rows, labels=labels, mean=rows.mean(axis=0))
        return file.getvalue()
    content = {"data": rows, "labels": labels.tolist(), "mean": rows.mean(axis=0)}
    return pickle.dumps(content, protocol=2)


def new_imagenet(folder: Path, size: int, kind: str = "npz") -> tuple[np.ndarray, np.ndarray]:
    """The zips of ten batches of 4 images and one of 6; gives all pixels and their labels."""
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (46, size, size, 3), dtype=np.uint8)
    labels = rng.integers(1, 1001, 46)
    suffix, ending = ("_npz", ".npz") if kind == "npz" else ("", "")
    batches = {
        number: _batch(
            pixels[4 * number - 4 : 4 * number], labels[4 * number - 4 : 4 * number], kind
        )
        for number in range(1, 11)
    }
    groups = {"train_part1": range(1, 6), "train_part2": range(6, 11)}
    for group, numbers in groups.items() if size == 64 else [("train", range(1, 11))]:
        stem = f"Imagenet{size}_{group}{suffix}"
        files = {f"{stem}/train_data_batch_{n}{ending}": batches[n] for n in reversed(numbers)}
        zip_of(files, folder / f"{stem}.zip")
    validation = _batch(pixels[40:], labels[40:], kind)
    zip_of({f"val_data{ending}": validation}, folder / f"Imagenet{size}_val{suffix}.zip")
    return pixels, labels


def cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """cifar-10-python.tar.gz with batches of 5; gives all pixels and labels, of the test last."""
    rng = np.random.default_rng(10)
    pixels = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 30)
    files = {"cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": []})}
    for number, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        some = slice(5 * number, 5 * number + 5)
        rows = np.ascontiguousarray(pixels[some].transpose(0, 3, 1, 2)).reshape(5, -1)
        batch = {b"batch_label": b"", b"labels": labels[some].tolist(), b"data": rows}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
    gzip_tar(files, folder / "cifar-10-python.tar.gz")
    return pixels, labels


def ilsvrc2012(folder: Path) -> None:
    """The three archives: per class the awkward files and a truncated one; 6 validation images."""
    inner = {}
    for number, synset in enumerate(SYNSETS):
        files = [*awkward(number).values(), unreadable(number)["truncated"]]
        names = [f"{synset}_{k}.JPEG" for k in range(len(files))]
        inner[f"{synset}.tar"] = tar_of(dict(zip(names, files, strict=True)))
    tar_of(dict(reversed(inner.items())), folder / "ILSVRC2012_img_train.tar")
    truth = [1, 3, 2, 2, 1, 3]
    files = {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(100 + k) for k in (3, 1, 2, 6, 5, 4)}
    tar_of(files, folder / "ILSVRC2012_img_val.tar")
    synsets = [(number, wnid, 0) for wnid, number in ILSVRC_IDS.items()] + [(1001, "n00001740", 3)]
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(synsets, fields)[:, None]})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt":
            "".join(f"{number}\n" for number in truth).encode(),
    }  # fmt: skip
    gzip_tar(devkit, folder / "ILSVRC2012_devkit_t12.tar.gz")


def synset_tars(count: int = 40, synsets: Sequence[str] = SYNSETS) -> dict[str, bytes]:
    """A tar per class with `count` images and the unreadable files; the last one is cut short."""
    tars = {}
    for number, synset in enumerate(synsets):
        files = {f"{synset}_{k}.JPEG": jpeg(1000 * number + k, 40, 36) for k in range(count)}
        bad = unreadable(number).values()
        files |= {f"{synset}_{900 + k}.JPEG": content for k, content in enumerate(bad)}
        tars[f"{synset}.tar"] = tar_of(files)
    last = tars[f"{synsets[-1]}.tar"]
    tars[f"{synsets[-1]}.tar"] = last[: len(last) // 2 // 512 * 512 + 200]
    return tars


def imagenet21k(folder: Path, layout: str, **options) -> None:
    """Per-synset tars in a folder, or in the outer tar, compressed or not."""
    tars = synset_tars(**options)
    if layout == "winter21_whole":
        (folder / layout).mkdir()
        for name, content in tars.items():
            (folder / layout / name).write_bytes(content)
        return
    outer = tar_of({f"{layout.split('.')[0]}/{name}": content for name, content in tars.items()})
    (folder / layout).write_bytes(gzip.compress(outer) if layout.endswith(".gz") else outer)


def afhq(folder: Path, name: str = "afhq.zip", held_out: str = "val") -> None:
    files = {
        f"afhq/{split}/{kind}/{kind}_{number}.jpg": jpeg(number + 10 * len(kind), 96, 96)
        for split, count in (("train", 3), (held_out, 2))
        for kind in ("wild", "cat", "dog")
        for number in range(count)
    }
    zip_of({"afhq/train/": b"", **files}, folder / name)


def training_images(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Archives of "afhq/…" or "imagenet64_old" whose training images are these, in that order."""
    if name.startswith("afhq"):
        members = {f"afhq/train/cat/{file}": content for file, content in files.items()}
        zip_of(members, folder / "afhq.zip")
    else:
        old_imagenet(folder, 64, validation=1)
        tar_of(files, folder / "train_64x64.tar")


def tree(folder: Path) -> None:
    """`folder`/pets, with the awkward and the unreadable files."""
    files = awkward(1) | {f"plain {number}": jpeg(number) for number in range(40)} | unreadable(1)
    for number, (name, content) in enumerate(files.items()):
        path = folder / "pets" / ("cats", "dogs")[number % 2] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
