from pathlib import Path

import pytest

from tests.data_prep.runs import content, prepare, write_corpus


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run into a local folder that nothing stopped has written."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert prepare(texts, folder) == 0
    return content(folder)
