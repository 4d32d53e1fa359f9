"""Test sources: which are found under paths and addresses, in which order, and their contents."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from seewhy.data import remote
from seewhy.data.listing import find_images
from seewhy.data.remote import join_path, list_files, list_names, remove_file, write_atomic
from seewhy.errors import DataError, OutputError
from seewhy.inference.work_units import FILES_PER_SOURCE, find_sources, read_source, sources_from_paths
from tests.cheap_saved import jpegs, write_parquet, write_tar


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    return jpegs(7)


@pytest.fixture
def mixed(tmp_path: Path, contents: list[bytes]) -> Path:
    for n, data in enumerate(contents):
        (tmp_path / "plain" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / "deep" / f"{n}.jpg").write_bytes(data)
    write_tar(tmp_path / "shards" / "0.tar", contents)
    write_parquet(tmp_path / "shards" / "1.parquet", contents)
    return tmp_path


def test_the_images_are_those_of_predict_in_the_same_order(mixed: Path) -> None:
    inputs = [mixed / "plain", mixed / "shards"]
    sources = find_sources(inputs)
    assert [source.kind for source in sources] == ["files", "tar", "parquet"]
    names = [name for source in sources for name, _ in read_source(source)]
    assert names == [str(path) for path in find_images(inputs)]
    assert len(names) == 21
    assert [source.key for source in find_sources(inputs)] == [source.key for source in sources]


def test_contents_are_the_files_bytes(mixed: Path, contents: list[bytes]) -> None:
    files, tar, parquet = ([data for _, data in read_source(source)] for source in find_sources([mixed / "plain", mixed / "shards"]))
    assert files == tar == contents
    assert parquet == [data + f" {n}".encode() for n, data in enumerate(contents)]


def test_blocks_are_bounded_and_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(FILES_PER_SOURCE + 3):
        (folder / f"{n:05d}.png").touch()
    assert [len(source.paths) for source in find_sources([folder, str(folder / "0000*.png")])] == [FILES_PER_SOURCE, 3]


def test_a_changed_file_is_another_source(mixed: Path) -> None:
    before = [source.key for source in find_sources([mixed / "shards"])]
    (mixed / "shards" / "0.tar").write_bytes((mixed / "shards" / "0.tar").read_bytes() + bytes(512))
    after = [source.key for source in find_sources([mixed / "shards"])]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_relative_names_are_read_from_where_they_were_given(mixed: Path, monkeypatch: pytest.MonkeyPatch, contents: list[bytes]) -> None:
    monkeypatch.chdir(mixed)
    sources = find_sources(["plain", "shards/0.tar"])
    monkeypatch.chdir(mixed.parent)  # where a worker may stand
    assert next(name for name, _ in read_source(sources[0])) == "plain/deep/0.jpg"
    assert [data for _, data in read_source(sources[1])] == contents


def test_a_dataset_s_listing_becomes_its_shards_and_files(mixed: Path) -> None:
    listed = find_images([mixed / "plain", mixed / "shards"])
    found = [name for source in sources_from_paths(listed) for name, _ in read_source(source)]
    assert sorted(found) == sorted(map(str, listed))


def test_memory_and_file_addresses(mixed: Path, contents: list[bytes]) -> None:
    system = fsspec.filesystem("memory")
    system.pipe({f"/sources-test/{n}.jpg": data for n, data in enumerate(contents)})
    system.pipe("/sources-test/.hidden.jpg", b"")
    system.pipe("/sources-shards/b/0.tar", (mixed / "shards" / "0.tar").read_bytes())
    (source,) = find_sources(["memory://sources-test"])
    assert list(read_source(source)) == [(f"memory://sources-test/{n}.jpg", data) for n, data in enumerate(contents)]
    assert len(find_sources(["memory://sources-test/[2-4].jpg"])[0].paths) == 3
    (shard,) = find_sources(["memory://sources-shards"])
    assert [data for _, data in read_source(shard)] == contents
    assert [len(source.paths) for source in find_sources([f"file://{mixed}/plain"])] == [7]


def test_bad_content_is_told_in_its_place(mixed: Path, contents: list[bytes]) -> None:
    tar = mixed / "shards" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:9000])  # ends in the middle of a member
    found = list(read_source(find_sources([tar])[0]))
    assert [data for _, data in found[:-1]] == contents[: len(found) - 1]
    assert found[-1][0] == str(tar)
    assert "not a complete tar file" in str(found[-1][1])
    (mixed / "plain" / "deep" / "3.jpg").chmod(0o644)
    sources = find_sources([mixed / "plain"])
    (mixed / "plain" / "deep" / "3.jpg").unlink()  # between the listing and the reading
    assert [data for _, data in read_source(sources[0])][3] == "no such file"


def test_a_link_that_leads_nowhere_is_a_bad_image(mixed: Path, contents: list[bytes]) -> None:
    link = mixed / "plain" / "deep" / "3.jpg"
    link.unlink()
    link.symlink_to(mixed / "gone.jpg")
    (source,) = find_sources([mixed / "plain"])
    assert [data for _, data in read_source(source)] == [*contents[:3], "no such file", *contents[4:]]
    assert [path.name for path in find_images([mixed / "plain"])] == [Path(name).name for name, _ in read_source(source)]
    assert [data for _, data in read_source(sources_from_paths([link])[0])] == ["no such file"]
    (mixed / "gone.jpg").write_bytes(contents[3])
    assert find_sources([mixed / "plain"])[0].key != source.key  # so that it is looked at again


def test_images_beside_shards_are_refused(mixed: Path, contents: list[bytes]) -> None:
    cover = mixed / "shards" / "cover.jpg"
    cover.write_bytes(contents[0])
    with pytest.raises(DataError, match=r"/shards: holds shards \(0\.tar\) and images \(cover\.jpg\); separate them"):
        find_sources([mixed / "shards"])
    assert [source.kind for source in find_sources([mixed / "shards" / "*.tar", cover])] == ["tar", "files"]
    system = fsspec.filesystem("memory")
    system.pipe({"/sources-mixed/a/0.tar": (mixed / "shards" / "0.tar").read_bytes(), "/sources-mixed/cover.jpg": contents[0]})
    with pytest.raises(DataError, match=r"^memory://sources-mixed: holds shards \(a/0\.tar\) and images \(cover\.jpg\); separate them"):
        find_sources(["memory://sources-mixed"])
    system.rm("/sources-mixed/a/0.tar")  # answers that were written below the images are no shards
    system.pipe({"/sources-mixed/out/_seewhy.json": b"{}", "/sources-mixed/out/part-0-00000-last.parquet": b""})
    assert [list(source.paths) for source in find_sources(["memory://sources-mixed"])] == [["memory://sources-mixed/cover.jpg"]]


def test_options_of_other_file_systems_reach_them() -> None:
    handler = remote._file_system("memory://options-test", "?anon=true&region=x")[0].handler
    assert {name: handler.fs.storage_options[name] for name in ("anon", "region")} == {"anon": True, "region": "x"}
    fsspec.filesystem("memory").pipe("/options-test/a.jpg", b"1")
    (source,) = find_sources(["memory://options-test?region=x"])
    assert list(source.paths) == ["memory://options-test/a.jpg?region=x"]
    assert list(read_source(source)) == [("memory://options-test/a.jpg", b"1")]
    for address, said in (
        ("http://host/a.tar?token=secret", "\\?options are not supported"),
        ("memory://x?url=secret", "unsupported \\?options"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            find_sources([address])
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("nowhere/", "no such file, folder or pattern"),
        ("memory://not-there", "no such file or folder"),
        ("memory://sources-none/*.jpg", "no such file or folder"),
        ("foo://bucket/x", "unknown kind of address"),
        ("s3://bucket/x.tar.gz", "compressed"),
    ],
)
def test_what_cannot_be_found_is_one_line(item: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        find_sources([item])
    assert str(caught.value).startswith(item.partition("/*")[0].removesuffix("/x"))


def test_a_cloud_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(DataError, match=r"^s3://bucket/x\S*: cannot be reached .*; check the address") as caught:
        find_sources(["s3://bucket/x?region=us-east-1&endpoint_override=127.0.0.1:9&scheme=http"])
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="cannot be reached"):
        write_atomic("s3://bucket/x?region=us-east-1&endpoint_override=127.0.0.1:9&scheme=http", b"1")


@pytest.mark.parametrize("folder", ["memory://storage-test/out", "{}/out"])
def test_files_are_written_listed_and_removed_alike(folder: str, tmp_path: Path) -> None:
    path = folder.format(tmp_path)
    assert list_names(path) == []
    write_atomic(join_path(path, "b"), b"1")
    write_atomic(join_path(path, "a"), b"12")
    write_atomic(join_path(path, "a"), b"123")
    assert list_names(path) == ["a", "b"]
    assert [(file.path, file.size) for file in list_files(path)] == [(f"{path}/a", 3), (f"{path}/b", 1)]
    remove_file(join_path(path, "a"))
    remove_file(join_path(path, "a"))
    assert list_names(path) == ["b"]
