"""The cache: its place from the environment, what it holds and how large, cleared to nothing."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest
from filelock import FileLock

from seewhy.core.cache import cache_dir, clear_cache, list_cache, size_of
from seewhy.errors import OutputError


def fill(root: Path) -> None:
    (root / "features" / "one").mkdir(parents=True)
    (root / "features" / "two" / "deep").mkdir(parents=True)
    (root / "scenes" / "images").mkdir(parents=True)
    (root / "features" / "one" / "a.npy").write_bytes(bytes(100))
    (root / "features" / "one" / "b.npy").write_bytes(bytes(11))
    (root / "features" / "two" / "deep" / "c.npy").write_bytes(bytes(7))
    (root / "scenes" / "images" / "0.jpg").write_bytes(bytes(50))
    (root / "checked-1.sqlite").write_bytes(bytes(30))


def test_place_comes_from_the_environment_and_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("value", [None, ""])
def test_place_is_else_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("SEEWHY_CACHE")
    else:
        monkeypatch.setenv("SEEWHY_CACHE", value)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name, appauthor: str(tmp_path / name / str(appauthor)))
    assert cache_dir() == tmp_path / "seewhy" / "False"


def test_empty_cache(cache: Path) -> None:
    assert list_cache() == []
    assert clear_cache() == (0, [])
    assert cache.is_dir()


def test_list_names_stores_and_the_rest_with_their_sizes(cache: Path) -> None:
    fill(cache)
    assert [(entry.name, entry.size_bytes) for entry in list_cache()] == [
        ("features/one", 111),
        ("features/two", 7),
        ("checked-1.sqlite", 30),
        ("scenes", 50),
    ]
    assert all(entry.path == cache / entry.name for entry in list_cache())


def test_clear_frees_everything_and_says_how_much(cache: Path) -> None:
    fill(cache)
    assert clear_cache() == (198, [])
    assert list_cache() == []
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert clear_cache() == (0, [])


def test_size_of_a_file_a_folder_and_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    assert size_of(tmp_path / "checked-1.sqlite") == 30
    assert size_of(tmp_path / "features") == 118
    assert size_of(tmp_path) == 198
    assert size_of(tmp_path / "absent") == 0


def test_place_below_a_file_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError) as caught:
        cache_dir()
    assert (
        str(caught.value) == f"{tmp_path}/file/cache: cannot create the cache folder (Not a directory); set SEEWHY_CACHE to a writable one"
    )
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot create the cache folder"):
        list_cache()


def test_clear_leaves_what_another_process_writes(cache: Path) -> None:
    fill(cache)
    with FileLock(cache / "features" / "one" / "lock"):
        assert clear_cache() == (87, ["features/one"])
    assert [entry.name for entry in list_cache()] == ["features/one"]
