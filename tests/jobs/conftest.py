"""What tests of jobs share: a tiny pair of models, which is copied by who changes it, and Ray."""

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    from pair_files import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def ray_here():
    """Ray, started once for all tests of a module that need it; a run takes the one that is there."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
