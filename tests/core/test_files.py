from __future__ import annotations

import os
import stat
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from qadtr_brevitas.core.errors import CheckpointError, UsageError
from qadtr_brevitas.core.files import (
    check_replaceable,
    fingerprint_facts,
    fingerprint_file,
    fingerprint_tensors,
    read_json,
    recover_directory,
    replace_directory,
    write_atomically,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])


def fill_with(text: str):
    def fill(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text(text)

    return fill


def test_an_interrupt_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    replace_directory(tmp_path / "a", fill_with("one"))

    def interrupted(folder: Path) -> None:
        (folder / "half.txt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "a", interrupted)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["a.txt", "deep"]


def test_a_folder_is_replaceable_if_all_its_files_would_be_written_again(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "missing", (), advice="choose another")
    replace_directory(tmp_path / "a", fill_with("one"))
    check_replaceable(tmp_path / "a", ("a.txt", "deep/b.txt", "c.txt"), advice="choose another")
    with pytest.raises(UsageError, match=r"deep/b\.txt.*choose another"):
        check_replaceable(tmp_path / "a", ("a.txt",), advice="choose another")
    # Also where only a link leads to nothing.
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="link"):
        check_replaceable(tmp_path / "a", ("a.txt", "deep/b.txt"), advice="choose another")


def test_a_file_is_made_with_its_folder_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two"):
        write_atomically(target, lambda path, text=text: path.write_text(text))
        assert target.read_text() == text
    assert names(target.parent) == ["a.txt"]


def test_the_temporary_name_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    seen: list[Path] = []
    write_atomically(tmp_path / "a.png", lambda path: (seen.append(path), path.touch()))
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path
    assert seen[0].name != "a.png"


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("the writer's own error")

    with pytest.raises(RuntimeError, match="the writer's own error"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "the disk may be full"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "the disk may be full"),
    ],
)
def test_a_full_disk_is_said_so(tmp_path: Path, error: Exception, reason: str) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(CheckpointError, match=rf"cannot write .*a\.txt: {reason}; what was there is unchanged\. Free"):
        write_atomically(tmp_path / "a.txt", fail)
    with pytest.raises(CheckpointError, match=rf"cannot write .*folder: {reason}"):
        replace_directory(tmp_path / "folder", lambda path: fail(path / "a.txt"))
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["torch.save(x, path)", "safetensors.torch.save_file({'x': x}, path)"])
def test_real_writers_on_a_disk_that_is_full(tmp_path: Path, writer: str) -> None:
    """A limit on the size of files stands for the full disk."""
    script = f"""
import resource, signal, sys, torch, safetensors.torch
from pathlib import Path
from qadtr_brevitas.core.errors import CheckpointError
from qadtr_brevitas.core.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
x = torch.zeros(100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_atomically(Path({str(tmp_path)!r}) / "x.pt", lambda path: {writer})
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "cannot write" in result.stdout, result.stderr
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_atomically(tmp_path / "file" / "a.txt", lambda path: path.touch())
    with pytest.raises(CheckpointError, match="a file of that name is in the way"):
        replace_directory(tmp_path / "file", fill_with("new"))
    assert (tmp_path / "file").is_file()


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_atomically(tmp_path / "a.txt", lambda path: path.touch())
    assert names(tmp_path) == ["a.txt"]


def test_files_get_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "last"
    replace_directory(target, fill_with("one"))
    (target / "stray.txt").write_text("")
    replace_directory(target, fill_with("two"))
    assert names(target) == ["a.txt", "deep"]
    assert (target / "deep" / "b.txt").read_text() == "two"
    assert names(target.parent) == ["last"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_at_any_rename_loses_nothing(tmp_path: Path, renames: int) -> None:
    """The process dies before its n-th rename; whoever comes next finds the old folder or the new one, whole."""
    target = tmp_path / "last"
    replace_directory(target, fill_with("old"))
    script = f"""
import os
from pathlib import Path
import qadtr_brevitas.core.files as files
left, replace = {renames}, os.replace
def dying(source, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    replace(source, target)
files.os.replace = dying
def fill(folder):
    (folder / "a.txt").write_text("new")
files.replace_directory(Path({str(target)!r}), fill)
"""
    assert run(script).returncode == (9 if renames < 2 else 0)
    recover_directory(target)
    assert (target / "a.txt").read_text() == ("old" if renames == 0 else "new")
    replace_directory(target, fill_with("newer"))
    assert (target / "a.txt").read_text() == "newer"
    assert names(tmp_path) == ["last"]


def test_recovering_what_is_whole_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "last"
    recover_directory(target)
    assert not target.exists()
    replace_directory(target, fill_with("one"))
    recover_directory(target)
    assert names(tmp_path) == ["last"]


def test_json_is_readable_and_read_back(tmp_path: Path) -> None:
    data = {"name": "Größe", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", data)
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == data


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist; check the path"),
        (b'{"a": 1', "is damaged or not JSON"),
        (b"\x80\x04\x95", "is damaged or not JSON"),
        (b"", "is damaged or not JSON"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_json(tmp_path / "a.json")


def test_a_folder_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path)


def test_file_fingerprint_is_of_bytes_and_facts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert fingerprint_file(one) == fingerprint_file(two) == blake2b(b"weights", digest_size=16).hexdigest()
    assert fingerprint_file(one, facts={"first_last": "8bit"}) != fingerprint_file(two, facts={"first_last": "same"})
    two.write_bytes(b"weightS")
    assert fingerprint_file(one) != fingerprint_file(two)


def test_tensor_fingerprint_is_of_values_shapes_and_types() -> None:
    values = torch.arange(6)
    different = [values, values.view(2, 3), values.int(), values + 1, values.flip(0)]
    assert len({fingerprint_tensors([tensor]) for tensor in different}) == len(different)
    assert fingerprint_tensors([values]) == fingerprint_tensors([torch.arange(12)[::2] // 2])


def test_order_of_keys_does_not_matter() -> None:
    assert fingerprint_facts({"a": 1, "b": 2}) == fingerprint_facts({"b": 2, "a": 1})
    assert fingerprint_facts({"a": 1}) != fingerprint_facts({"a": 2})
