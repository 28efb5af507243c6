"""Fixtures: one Ray cluster of two CPUs for a session, and an S3 server that its workers can reach."""

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
    """Start an S3 server, and make `s3://` use it in this process and in those of the cluster."""
    with object_store() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, session_signing_key: Path, store: ObjectStore) -> Iterator[Path]:
    """Start a cluster whose workers can import the rewards of the tests; yield the folder of their markers."""
    notes = tmp_path_factory.mktemp("notes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        patch.setenv(NOTES, str(notes))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        start_local(num_cpus=2, object_store_memory=200 * 2**20)
        import ray

        # The runs that are compared with the cluster are in this process, where no reward may end the process.
        patch.delenv(NOTES)
        try:
            yield notes
        finally:
            ray.shutdown()
