"""Archives made to do harm, and archives that were damaged; nothing of them reaches the disk."""

from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import os
import stat
import tarfile
import tracemalloc
import zipfile

import pytest

from k_diffusion.training.archive import Archive
from k_diffusion.training.dataset import DataError

FILES = {"a/one.txt": b"one" * 50, "b/two.bin": bytes(range(256)) * 9, "three": b""}


def _zip(path, files=FILES, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tar(path, files=FILES):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [_zip, lambda p: _zip(p, method=zipfile.ZIP_STORED), _tar])
def test_reads_what_was_written(tmp_path, make):
    archive = Archive(make(tmp_path / "shard"))
    assert {m.name: archive.read(i) for i, m in enumerate(archive.members)} == FILES


def test_forked_processes_share_it(tmp_path):
    archive = Archive(_zip(tmp_path / "x.zip", {str(i): bytes([i]) * 999 for i in range(40)}))

    def work(queue):
        queue.put(all(archive.read(i) == bytes([i]) * 999 for _ in range(20) for i in range(40)))

    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [fork.Process(target=work, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert archive.read(39) == bytes([39]) * 999
    assert [queue.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join()


HOSTILE = ["../x", "/etc/x", "a/../../x", "C:\\x", "c:/x", "a\\..\\x"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("make", [_zip, _tar])
def test_names_that_lead_outside_are_refused_by_name(tmp_path, make, name):
    before = set(tmp_path.parent.iterdir())
    path = make(tmp_path / "shard", {"good": b"1", name: b"2"})
    with pytest.raises(DataError, match="leads outside") as error:
        Archive(path)
    assert name in str(error.value).replace("\\\\", "\\")
    assert set(tmp_path.parent.iterdir()) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("passwords.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"'passwords\.png' is a link, a device or sparse"):
        Archive(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_a_link_or_device_in_a_zip_is_refused(tmp_path, kind):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("passwords.png")
        info.external_attr = (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"'passwords\.png' is a link or a device"):
        Archive(path)


def test_a_nul_hides_nothing(tmp_path):
    """Many readers, Python's among them, take the name to end there."""
    path = _zip(tmp_path / "x.zip", {"a/b.png_.sh": b"1"})
    path.write_bytes(path.read_bytes().replace(b"b.png_.sh", b"b.png\0.sh"))
    with pytest.raises(DataError, match=r"'a/b\.png\\x00\.sh' leads outside"):
        Archive(path)


def test_other_ways_of_packing_and_encryption_are_refused(tmp_path):
    path = _zip(tmp_path / "x.zip", method=zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=r"'a/one\.txt' is packed by another method than deflate"):
        Archive(path)
    content = bytearray(_zip(path).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"'a/one\.txt' is encrypted"):
        Archive(path)


def test_sparse_files_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("holes.png")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
        archive.addfile(info)
    with pytest.raises(DataError, match=r"'holes\.png' is a link, a device or sparse"):
        Archive(path)


def test_what_lies_elsewhere_than_it_says(tmp_path):
    archive = Archive(_zip(tmp_path / "x.zip", method=zipfile.ZIP_STORED))
    first = archive.members[0]
    for changed, reason in (
        (first._replace(offset=first.offset + 1), "damaged: it does not begin where"),
        (first._replace(packed=10**6), "^truncated$"),
        (first._replace(packed=1 << 29), "536870912 bytes are more than max_bytes"),
    ):
        archive.members = (changed,)
        with pytest.raises(DataError, match=reason):
            archive.read(0)


class Zeros(io.RawIOBase):
    """A file of so many zeros, of which none is ever in memory."""

    def __init__(self, size):
        self.left = size

    def readinto(self, buffer):
        count = min(len(buffer), self.left)
        buffer[:count] = bytes(count)
        self.left -= count
        return count

    def readable(self):
        return True


def _bomb(path, size):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("zeros.png", "w", force_zip64=True) as out:
            zeros = Zeros(size)
            while chunk := zeros.read(1 << 20):
                out.write(chunk)
        archive.writestr("good.txt", b"good")
    return path


def _declare(path, size, real):
    """Changes what a zip says of the size of its first file, in both places."""
    content = path.read_bytes()
    assert content.count(real.to_bytes(4, "little")) >= 1
    path.write_bytes(content.replace(real.to_bytes(4, "little"), size.to_bytes(4, "little")))


def test_a_bomb_costs_no_memory(tmp_path):
    archive = Archive(_bomb(tmp_path / "x.zip", 1 << 29))  # 512 MiB of zeros in half a megabyte
    tracemalloc.start()
    with pytest.raises(DataError, match="536870912 bytes are more than max_bytes 268435456"):
        archive.read(0)
    assert archive.read(1) == b"good"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def _header(name, size, kind=tarfile.REGTYPE):
    """A tar's header that says any size, which has 8 bytes beside octal digits for large ones."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = bytes([0xFF if size < 0 else 0x80]) + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


ENDLESS = {
    "negative": _header("back.png", -512),
    "negative more": _header("back.png", -1024),
    "long name": _header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME),
    "long link": _header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGLINK),
    "pax": _header("pax", 1 << 40, tarfile.XHDTYPE),
    "global pax": _header("pax", 1 << 40, tarfile.XGLTYPE),
    "headers of headers": _header("pax", 0, tarfile.XHDTYPE) * 4000,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_headers_that_lie_about_their_size_take_neither_time_nor_memory(tmp_path, name):
    """The first two would be read again and again; the next ones, in a file with a hole of 1 GiB,
    would take as much memory."""
    path = tmp_path / "x.tar"
    path.write_bytes(_header("good.png", 0) + ENDLESS[name])
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"x\.tar( is damaged|: 'back\.png' has -)") as error:
        Archive(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 23
    assert "\n" not in str(error.value)


def test_a_name_of_any_length_is_read(tmp_path):
    name = "a/" + "b" * 9000
    archive = Archive(_tar(tmp_path / "x.tar", {name: b"1"}))
    assert [member.name for member in archive.members] == [name]


@pytest.mark.parametrize("make", [_zip, _tar])
def test_of_one_name_the_last_file_counts(tmp_path, make):
    pairs = [("a", b"first"), ("b", b"other"), ("a", b"last")]

    class Repeated(dict):
        def items(self):
            return pairs

    ignored = (
        pytest.warns(UserWarning, match="Duplicate name")
        if make is _zip
        else contextlib.nullcontext()
    )
    with ignored:
        path = make(tmp_path / "x", Repeated())
    archive = Archive(path)
    assert [archive.read(i) for i in range(len(archive))] == [b"last", b"other"]


@pytest.mark.parametrize("place", [(1 << 32) - 2, (1 << 63) - 1, (1 << 64) - 9])
def test_a_place_beyond_every_file_is_damage(tmp_path, place):
    archive = Archive(_zip(tmp_path / "x.zip"))
    archive.members = (archive.members[0]._replace(offset=place),)
    with pytest.raises(DataError, match="^damaged: it"):
        archive.read(0)


def test_a_zip_of_a_version_to_come_is_refused(tmp_path):
    path = _zip(tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 99
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.zip is damaged or neither .*: zip file version 9\.9"):
        Archive(path)


def test_a_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path):
    size = 50_331_653
    path = _zip(tmp_path / "x.zip", {"zeros.png": bytes(size)})
    _declare(path, 1000, size)
    archive = Archive(path)
    tracemalloc.start()
    with pytest.raises(DataError, match="not the 1000 bytes that the archive declares"):
        archive.read(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_every_flipped_bit_of_a_file_is_seen(tmp_path):
    path = _zip(tmp_path / "x.zip", {"one": os.urandom(64)}, zipfile.ZIP_STORED)
    start = path.read_bytes().index(b"one") + 3
    whole = path.read_bytes()
    for bit in range(0, 64 * 8, 7):
        damaged = bytearray(whole)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="its checksum is another one"):
            Archive(path).read(0)


@pytest.mark.parametrize("make", [_zip, _tar])
def test_a_truncated_archive_is_refused(tmp_path, make):
    path = make(tmp_path / "shard")
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        try:
            archive = Archive(path)
            contents = [archive.read(i) for i in range(len(archive))]
        except DataError:
            continue
        # A tar that was cut after a file is a shorter one: what it gives is whole.
        assert make is _tar
        assert contents == list(FILES.values())[: len(contents)]


def test_what_is_no_archive(tmp_path):
    text = tmp_path / "x.zip"
    text.write_text("hello")
    with pytest.raises(DataError, match="neither a zip nor an uncompressed tar"):
        Archive(text)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Archive(tmp_path / "missing.zip")
    packed = tmp_path / "x.tar.gz"
    packed.write_bytes(gzip.compress(_tar(tmp_path / "y.tar").read_bytes()))
    with pytest.raises(DataError, match="uncompressed tar"):
        Archive(packed)
