import pytest

from pintpot.core.errors import BudgetError, OutputExists
from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic


def test_write_atomic_replaces_and_leaves_no_partial(tmp_path):
    target = tmp_path / "file.json"
    write_atomic(target, "old")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as partial:
        (partial / "a").write_text("whole")
        assert not target.exists()
    assert (target / "a").read_text() == "whole"
    with pytest.raises(OutputExists), new_folder(target):
        pass


def test_new_folder_resumes(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", resume=True) as partial:
        (partial / "a").write_text("kept")
        raise RuntimeError
    with new_folder(tmp_path / "out", resume=True) as partial:
        assert (partial / "a").read_text() == "kept"
    assert (tmp_path / "out" / "a").exists()


def test_new_folder_with_nothing_to_resume_from_is_removed(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", resume=True) as partial:
        (partial / "checkpoints").mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_refuse_existing_allows_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refuse_existing(tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExists):
        refuse_existing(tmp_path / "file")


def test_require_disk(tmp_path):
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(BudgetError, match="free"):
        require_disk(tmp_path, 1 << 60)
