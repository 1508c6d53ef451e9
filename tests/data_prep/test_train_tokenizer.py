import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import PrepareError
from data_prep.readers import ReadSettings
from data_prep.sources import find_files, make_units
from data_prep.tokenizer import load_tokenizer
from data_prep.train_tokenizer import Texts, main, train

WORDS = ["the", "memory", "keeps", "learning", "while", "it", "reads", "größer", "漢字", "def", "return"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"body": " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 20))} for n in range(200)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    return folder


def test_a_trained_tokenizer_is_loaded_and_gives_texts_back(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = corpus / "new/tokenizer.json"
    arguments = ["--input", str(corpus), "--output", str(output), "--vocabulary", "300", "--text-field", "body"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "300 tokens from 200 documents" in said
    assert f"rejected: 1 x broken JSON, first {corpus}/a.jsonl:201 (Expecting property name" in said
    tokenizer = load_tokenizer(str(output))
    assert (tokenizer.vocabulary, tokenizer.end_of_document) == (300, 0)
    text = "the memory, größer\r\n\x00 <|endoftext|>  end"
    tokens = tokenizer.encode([text, "the memory"])
    assert tokenizer.decode(tokens[0].tolist()) == text and 0 not in tokens[0] and len(tokens[1]) <= 4


def test_the_same_corpus_gives_the_same_file_whatever_the_threads(tmp_path: Path) -> None:
    files = []
    for threads in ("1", "4"):
        output = tmp_path / f"{threads}.json"
        command = [sys.executable, "-m", "data_prep.train_tokenizer", "--default-corpus", "--max-bytes", "1mb"]
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([*command, "--vocabulary", "2000", "--output", str(output)], check=True, env=environment)
        files.append(output.read_bytes())
    assert files[0] == files[1] and len(json.loads(files[0])["model"]["vocab"]) == 2000


def test_a_file_that_exists_is_kept(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "tokenizer.json").write_text("mine")
    assert main(["--input", str(corpus), "--output", str(corpus / "tokenizer.json")]) == 2
    assert "tokenizer.json exists; remove it or name another file" in capsys.readouterr().err
    assert (corpus / "tokenizer.json").read_text() == "mine"


def test_what_cannot_be_trained_is_refused_and_nothing_is_written(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "tokenizer.json")]
    refused = {
        "must be at least 257": ["--input", str(corpus), "--vocabulary", "256"],
        f"200 x missing field, first {corpus}/a.jsonl:1 (field 'text' is missing; fields: body)": [
            "--input",
            str(corpus),
        ],
        "200 x too long, first": ["--input", str(corpus), "--text-field", "body", "--max-document-size", "9"],
        "the separator '\\udcff' is not valid UTF-8": ["--input", str(corpus), "--document-separator", "\udcff"],
        "no such file or folder": ["--input", str(tmp_path / "nowhere")],
    }
    for message, arguments in refused.items():
        assert main([*arguments, *output]) == 2
        assert message in capsys.readouterr().err
    assert main(["--input", str(corpus), "--output", "s3://bucket/tokenizer.json"]) == 2
    assert not (tmp_path / "tokenizer.json").exists()


def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert main(["--input", "nowhere", "--output", str(tmp_path / "file" / "x.json")]) == 2
    assert f"nothing can be written in {tmp_path / 'file'}; name another folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    assert main(["--input", "nowhere", "--output", str(tmp_path / "new" / "x.json")]) == 2
    assert f"nothing can be written in {tmp_path}; name another folder" in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.train_tokenizer", "--default-corpus", "--vocabulary", "60000"]
    output = tmp_path / "tokenizer.json"
    run = subprocess.Popen([*command, "--output", str(output)], stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None and run.stderr.readline().startswith("read ")
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    rest = run.communicate(timeout=60)[1].splitlines()
    assert run.returncode == 130 and time.monotonic() - began < 3
    assert [line for line in rest if not line.startswith("read ")] == [
        "train_tokenizer: stopped, nothing is written; run the same command again"
    ]
    assert not output.exists()


def test_max_bytes_bounds_the_text(corpus: Path) -> None:
    units = make_units(find_files([str(corpus)])[0])
    texts = Texts(units, ReadSettings(text_field="body"), 1000, print)
    found = list(texts)
    assert 0 < len(found) == texts.documents < 200
    assert 800 < sum(len(text.encode()) for text in found) == texts.bytes <= 1000


def test_an_error_of_reading_ends_the_training(corpus: Path) -> None:
    units = make_units(find_files([str(corpus)])[0])
    (corpus / "a.jsonl").write_text("other")
    with pytest.raises(PrepareError, match=r"a\.jsonl has 5 bytes now"):
        train(Texts(units, ReadSettings(), None, print), 300)
