from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.corpus import prepare_folder, prepare_sources
from tests.faults import Faults, proxy
from tests.s3 import environment, set_environment


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of compressed shards; tests that damage it copy it first."""
    return prepare_folder(tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three prepared folders, by the name of the source."""
    return prepare_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def prepared_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in shards that are not compressed."""
    return prepare_folder(tmp_path_factory.mktemp("raw"), compression="none")


@pytest.fixture
def faults(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Between this process and the module's `server`, the address of a real S3 server."""
    with proxy(server) as running:
        set_environment(environment(running.address), monkeypatch)
        yield running
