"""A cluster for the tests of `launch=slurm`, and what is equal in two runs."""

import pytest

from tests.slow.cluster import Cluster
from tests.train.conftest import metrics, server, unequal, whole  # noqa: F401


@pytest.fixture(scope="session")
def cluster():
    """A SLURM of their own; not skipped where its packages are missing: `.ci/run` installs them."""
    one = Cluster()
    one.start()
    yield one
    one.stop()
