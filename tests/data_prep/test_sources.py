import json
import os
import pickle
from pathlib import Path

import pytest

from data_prep.errors import PrepareError
from data_prep.sources import UNIT_FILES, SourceFile, Unit, default_corpus, find_files, make_units
from tests.s3 import environment, s3_server, set_environment, upload


def names(*inputs: Path | str) -> list[str]:
    return [file.name for file in find_files([str(text) for text in inputs])[0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result = tmp_path / "top"
    for name in ("b.txt", "a/z.md", "a/c.py", "a/d/e.jsonl.zst", "image.png", ".hidden/x.txt", "a/.x.txt"):
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        (result / name).write_text(name)
    return result


ALL = ["top/a/c.py", "top/a/d/e.jsonl.zst", "top/a/z.md", "top/b.txt"]


def test_a_folder_gives_its_texts_in_sorted_order_and_counts_the_rest(folder: Path) -> None:
    files, left_out, _ = find_files([f"{folder}/"])
    assert [file.name for file in files] == ALL and left_out == {"unknown kind of file": 1}
    assert files[0].path == str(folder / "a/c.py") and files[0].bytes == 6
    assert files[0].mtime_ns == (folder / "a/c.py").stat().st_mtime_ns


def test_a_path_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names(".") == ALL and names("b.txt") == ["b.txt"]
    assert find_files(["b.txt"])[0][0].path == str(folder / "b.txt")


PATTERNS = {
    "*.txt": ["top/b.txt"],
    "**/*.md": ["top/a/z.md"],
    "**/*.jsonl.zst": ["top/a/d/e.jsonl.zst"],
    "a/*": ["a/c.py", "a/d/e.jsonl.zst", "a/z.md"],
    "[ab]*": ALL,
    "?/[cz].*": ["top/a/c.py", "top/a/z.md"],
    "**": ALL,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_files_and_folders(folder: Path, pattern: str) -> None:
    assert names(f"{folder}/{pattern}") == PATTERNS[pattern]


def test_a_name_that_looks_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "[1].txt").write_text("text")
    assert names(tmp_path / "[1].txt") == ["[1].txt"]


def test_a_list_names_one_input_per_line(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "files.list"
    listed.write_text(f"# texts\n\n  {folder}/b.txt\n{folder}/a/*.py\n{folder}/a/d\n")
    assert names(f"@{listed}") == ["a/c.py", "b.txt", "d/e.jsonl.zst"]


def test_s3_is_searched_as_the_disk_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text("s3://corpus/in/top/a/*.py\n")
    with s3_server() as address:
        set_environment(environment(address), monkeypatch)
        url = upload(address, tmp_path, "in")
        assert names(f"{url}/top") == names(f"{url}/top/") == ALL
        for pattern, expected in PATTERNS.items():
            assert names(f"{url}/top/{pattern}") == expected, pattern
        assert names(f"@{url}/list") == ["a/c.py"]
        files, left_out, _ = find_files([f"{url}/top", str(folder)])
        assert [file.path for file in files[:2]] == [str(folder / "a/c.py"), f"{url}/top/a/c.py"]
        assert len(files) == 2 * len(ALL) and left_out == {"unknown kind of file": 2}
        with pytest.raises(PrepareError, match="the pattern matches no file"):
            names(f"{url}/nowhere/*.txt")


def test_a_file_named_twice_counts_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert names(folder, folder / "b.txt", f"{folder}/*", tmp_path / "link") == ALL


def test_the_order_of_the_inputs_does_not_matter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(folder / "a")
    inputs = [str(path) for path in (folder, folder / "a", folder / "a" / "c.py", tmp_path / "b")]
    found = find_files(inputs)
    assert found == find_files(inputs[::-1]) == find_files([*inputs[2:], *inputs[:2]])
    # The shortest folder in which a file is found gives it its name.
    assert [file.name for file in found[0]] == ["b/c.py", "b/d/e.jsonl.zst", "b/z.md", "top/b.txt"]


def test_what_is_written_is_not_read(folder: Path) -> None:
    files, left_out, _ = find_files([str(folder)], without=[f"{folder}/a", f"{folder}/b"])
    assert [file.name for file in files] == ["top/b.txt"]
    assert left_out == {"of the output": 3, "unknown kind of file": 1}
    assert names(folder / "a") == [file.name for file in find_files([f"{folder}/a"], without=[str(folder)])[0]]


def test_files_of_one_name_from_two_inputs_both_count(tmp_path: Path) -> None:
    for name in ("x/same/a.txt", "y/same/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    files = find_files([str(tmp_path / "y/same"), str(tmp_path / "x/same")])[0]
    assert [(file.name, file.path) for file in files] == [
        ("same/a.txt", str(tmp_path / "x/same/a.txt")),
        ("same/a.txt", str(tmp_path / "y/same/a.txt")),
    ]


def test_inputs_that_cannot_be_meant_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.list").write_text("# nothing\n")
    (tmp_path / "nested.list").write_text("@other\n")
    (tmp_path / "missing.list").write_text(f"{folder}/nowhere.txt\n")
    (tmp_path / "empty").mkdir()
    refused = {
        f"{tmp_path}/nowhere": "nowhere: no such file or folder; check the spelling",
        f"{folder}/image.png": r"image\.png: unknown kind of file; known: \.md \.py \.txt .* \.parquet",
        f"{folder}/*.parquet": "the pattern matches no file; check it",
        f"@{tmp_path}/nowhere": "nowhere: no such file",
        f"@{tmp_path}/empty.list": "the list is empty; write one path, URL or pattern per line",
        f"@{tmp_path}/nested.list": "@other is a list inside a list",
        f"@{tmp_path}/missing.list": "top/nowhere.txt: no such file",
        f"{tmp_path}/empty": r"no \.md .* file in .*empty; name a folder that holds text",
        "gs://bucket/x": "not a known address",
        "": "--input is empty; name a file or a folder, as . for this one",
    }
    for text, message in refused.items():
        with pytest.raises(PrepareError, match=message):
            find_files([text])


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return find_files([str(tmp_path)])[2]

    path = tmp_path / "a.txt"
    path.write_text("one")
    found = [fingerprint()]
    path.write_text("two!")
    found.append(fingerprint())
    os.utime(path, ns=(0, 0))
    found.append(fingerprint())
    path.rename(tmp_path / "b.txt")
    found.append(fingerprint())
    assert len(set(found)) == 4 and fingerprint() == found[-1]


def test_the_default_corpus_is_the_standard_library() -> None:
    files, left_out, fingerprint = default_corpus()
    found = [file.name for file in files]
    assert "os.py" in found and "json/decoder.py" in found and found == sorted(found) and left_out == {}
    assert not [name for name in found if "site-packages" in name or "__pycache__" in name]
    assert default_corpus() == (files, {}, fingerprint)


def test_kind_and_compression_follow_from_the_name() -> None:
    kinds = {name: SourceFile(f"/x/{name}", name, 0) for name in ("a.txt.gz", "a.json.gz", "a.jsonl.zst", "a.parquet")}
    assert [(file.kind, file.compression) for file in kinds.values()] == [
        ("text", "gzip"), ("lines", "gzip"), ("lines", "zstd"), ("parquet", None),
    ]  # fmt: skip


def covered(units: list[Unit]) -> list[tuple[list[str], int, int]]:
    return [([file.name for file in unit.files], unit.begin, unit.end) for unit in units]


def file(name: str, size: int) -> SourceFile:
    return SourceFile(f"/x/{name}", name, size, 1)


def test_large_files_are_cut_where_their_kind_allows_it_and_small_ones_are_grouped() -> None:
    files = [file("a.txt", 30), file("b.jsonl", 70), file("c.txt", 1), file("d.jsonl", 250), file("e.txt", 250),
             file("f.jsonl.gz", 250), file("g.parquet", 101), file("h.md", 0), file("i.py", 100)]  # fmt: skip
    whole = [(["e.txt"], 0, 250), (["f.jsonl.gz"], 0, 250), (["g.parquet"], 0, 100), (["g.parquet"], 100, 101)]
    first = [(["a.txt", "b.jsonl"], 0, 100), (["c.txt"], 0, 1)]
    first += [(["d.jsonl"], 0, 100), (["d.jsonl"], 100, 200), (["d.jsonl"], 200, 250)]
    assert covered(make_units(files, 100)) == [*first, *whole, (["h.md", "i.py"], 0, 100)]
    separated = covered(make_units(files, 100, separator="<|end|>"))
    assert separated[5:8] == [(["e.txt"], 0, 100), (["e.txt"], 100, 200), (["e.txt"], 200, 250)]
    assert [unit.number for unit in make_units(files, 100)] == list(range(10))


def test_a_unit_has_a_bounded_number_of_files() -> None:
    units = make_units([file(f"{n:05}.txt", 1) for n in range(2 * UNIT_FILES + 1)])
    assert [len(unit.files) for unit in units] == [UNIT_FILES, UNIT_FILES, 1]


def test_units_can_be_sent_and_stored_and_their_keys_follow_what_they_cover() -> None:
    files = [file("a.jsonl", 250), file("b.txt", 1)]
    units = make_units(files, 100)
    assert pickle.loads(pickle.dumps(units)) == units
    assert [Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units] == units
    changed = [SourceFile("/y/a.jsonl", "a.jsonl", 250, 1), SourceFile("/x/a.jsonl", "a.jsonl", 250, 2)]
    keys = [unit.key() for other in (files[0], *changed) for unit in make_units([other, files[1]], 100)]
    assert len(set(keys)) == 3 * 3 + 1  # the unit of b.txt stays
    assert [unit.key() for unit in make_units(files, 100)] == keys[:4]
