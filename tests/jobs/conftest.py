"""The tiny pair of models that the tests of jobs share; who changes it copies it."""

import pytest


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    from pair_files import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"))
