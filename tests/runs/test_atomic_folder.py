"""Folders that are whole or not there, and what is found out about damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from coconut_ds.runs import atomic_folder


def write(path: Path, text: str = "some weights") -> Path:
    unfinished = atomic_folder.begin(path)
    (unfinished / "model").mkdir()
    (unfinished / "model" / "weights").write_text(text)
    (unfinished / "progress").write_text("3")
    return atomic_folder.publish(unfinished)


def test_a_published_folder_has_its_name_and_no_fault(tmp_path):
    unfinished = atomic_folder.begin(tmp_path / "epoch_0001")
    assert not (tmp_path / "epoch_0001").exists()
    assert unfinished.is_dir()
    path = write(tmp_path / "epoch_0001")
    assert path == tmp_path / "epoch_0001"
    assert atomic_folder.faults(path) == []
    assert [each.name for each in tmp_path.iterdir()] == ["epoch_0001"]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: (path / "model" / "weights").write_text("some weight"), "has 11 bytes and should have 12"),
        (lambda path: (path / "model" / "weights").write_text("some weighty"), "is not what was written"),
        (lambda path: (path / "progress").unlink(), "progress is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"mod'), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"progress": {"bytfs": 1}}}'), "is damaged"),
    ],
    ids=["truncated", "flipped", "deleted", "no manifest", "half a manifest", "another manifest", "flipped manifest"],
)
def test_every_damage_is_found(tmp_path, damage, found):
    path = write(tmp_path / "epoch_0001")
    damage(path)
    (fault,) = atomic_folder.faults(path)
    assert found in fault


def test_writing_again_takes_the_place_of_what_has_the_name(tmp_path):
    write(tmp_path / "epoch_0001", "old")
    path = write(tmp_path / "epoch_0001", "new")
    assert (path / "model" / "weights").read_text() == "new"
    assert atomic_folder.faults(path) == []


def test_what_an_interrupted_attempt_left_is_removed(tmp_path):
    (tmp_path / "epoch_0001.tmp").mkdir()
    (tmp_path / "epoch_0000.removed" / "model").mkdir(parents=True)
    write(tmp_path / "epoch_0002")
    assert [each.name for each in tmp_path.iterdir()] == ["epoch_0002"]


def test_what_is_set_aside_is_out_of_the_way_more_than_once(tmp_path):
    for text in ("one", "two"):
        atomic_folder.set_aside(write(tmp_path / "epoch_0001", text))
    assert [each.name for each in tmp_path.iterdir()] == ["epoch_0001.damaged"]
    assert (tmp_path / "epoch_0001.damaged" / "model" / "weights").read_text() == "two"


def test_removing_frees_the_name_first(tmp_path, monkeypatch):
    """Whatever interrupts the removal, no half folder is left under a name that counts."""
    path = write(tmp_path / "epoch_0001")

    def stop(*_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic_folder.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        atomic_folder.remove(path)
    assert [each.name for each in tmp_path.iterdir()] == ["epoch_0001.removed"]
