"""Files are whole or absent, and nothing but a regular file is ever replaced."""

import errno
import os
import signal

import pytest

from lightning_prune.errors import OptionError
from lightning_prune.files import whole_file, write_text


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def fail_half_way():
        with whole_file(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            raise RuntimeError("mid write")

    with pytest.raises(RuntimeError, match="mid write"):
        fail_half_way()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_error_that_changes_nothing(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with (
        pytest.raises(OptionError, match=r"No space left on device\. Nothing was changed"),
        whole_file(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    child = os.fork()
    if not child:
        with whole_file(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "a.txt").read_text() == "old"


def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", "no regular file"), (".", "a folder")):
        with pytest.raises(OptionError, match=kind):
            write_text(tmp_path / name, "text")


def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
