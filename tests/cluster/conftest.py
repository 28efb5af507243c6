"""One Ray cluster of two CPUs for a session, ended with it, and an S3 server that its workers find."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_rewards import NOTES
from object_store import ObjectStore, object_store

from frostline.cluster.session import start_local

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    """An S3 server that `s3://` leads to, in this process and in those of the cluster."""
    with object_store() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path, store: ObjectStore) -> Iterator[Path]:
    """A cluster whose workers find the rewards of the tests; returns the folder of their notes."""
    notes = tmp_path_factory.mktemp("notes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        patch.setenv(NOTES, str(notes))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        start_local(num_cpus=2, object_store_memory=200 * 2**20)
        import ray

        # What is compared with a cluster runs in this process, and is not to die.
        patch.delenv(NOTES)
        try:
            yield notes
        finally:
            ray.shutdown()
