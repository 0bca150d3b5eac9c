"""Archives and folders read in parts: what is whole comes, what is not is told."""

import errno
import tarfile
from pathlib import Path

import archives
import pytest

from jetflow.data.images import Unreadable
from jetflow.data.parts import FilePart, TarPart, flat_tar
from jetflow.types import UsageError

FILES = {f"{number}.png": bytes([number + 1]) * 700 for number in range(10)}
BLOCKS = 3  # of 512 bytes, that each file takes with its header


def flipped(tar: bytes) -> bytes:
    """One bit is wrong in the header of the sixth file."""
    place = 5 * BLOCKS * 512 + 20
    return tar[:place] + bytes([tar[place] ^ 1]) + tar[place + 1 :]


DAMAGED = {
    "a bit": flipped(archives.tar_of(FILES)),
    "cut in a header": archives.tar_of(FILES)[: 5 * BLOCKS * 512 + 200],
    "cut in a file": archives.tar_of(FILES)[: 5 * BLOCKS * 512 + 600],
}


def contents(part: TarPart | FilePart) -> tuple[list[bytes], list[str]]:
    """The files that were read, and the reasons of what was not."""
    found = [item.content for item in part.read()]
    return (
        [each for each in found if isinstance(each, bytes)],
        [str(each) for each in found if isinstance(each, Unreadable)],
    )


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("where", ["alone", "in a tar"])
def test_a_damaged_tar_of_a_class_is_listed(tmp_path, kind, where):
    path = tmp_path / "n01440764.tar"
    path.write_bytes(DAMAGED[kind])
    part = TarPart(path, path.name, 0, len(DAMAGED[kind]))
    if where == "in a tar":  # whose next bytes are those of another class
        outer = tmp_path / "outer.tar"
        archives.tar_of({path.name: DAMAGED[kind], "other.tar": archives.tar_of(FILES)}, outer)
        part = TarPart(outer, path.name, 512, len(DAMAGED[kind]))
    files, reasons = contents(part)
    assert files == list(FILES.values())[:5]
    assert len(reasons) == 1 and "damaged behind its file number 5" in reasons[0]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_tar_of_images_is_an_error(tmp_path, kind):
    path = tmp_path / "train_32x32.tar"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(tarfile.ReadError):
        list(flat_tar(path, 2**20, 3))


@pytest.mark.parametrize("trailer", [0, 512, 10_000])
def test_a_whole_tar_is_read_whatever_follows_its_last_file(tmp_path, trailer):
    path = tmp_path / "whole.tar"
    whole = archives.tar_of(FILES)[: 10 * BLOCKS * 512] + bytes(trailer)
    path.write_bytes(whole)
    files = list(FILES.values())
    assert contents(TarPart(path, path.name, 0, len(whole))) == (files, [])
    parts = list(flat_tar(path, 2**20, 3))
    assert [part.count for part in parts] == [3, 3, 3, 1]
    read = [contents(part) for part in parts]
    assert [each for some, _ in read for each in some] == files
    assert not any(reasons for _, reasons in read)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_what_a_disk_fails_to_read_for_now_is_not_left_out(tmp_path, monkeypatch, code):
    read = Path.read_bytes

    def read_bytes(path):
        if path.name == "b.png":
            raise OSError(code, "of that kind")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    part = FilePart(tmp_path, ("a.png", "b.png", "c.png"), (0, 0, 0), 3)
    if code in (errno.EIO, errno.ESTALE):
        with pytest.raises(UsageError, match=r"cannot read .*b\.png \(of that kind\)"):
            contents(part)
    else:
        assert contents(part) == ([b"a", b"c"], ["of that kind"])
