"""A scene for each test of a fault: data, a run in a folder, and the same run undisturbed to compare with."""

import pytest
from faults.scene import Scene, warm_up
from runs import write_data


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    found = write_data(folder / "data", (150, 250))
    warm_up(folder, found)
    return found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, manifest):
    """The undisturbed run of each setting, made when it is first asked for."""
    return Scene(tmp_path_factory.mktemp("undisturbed"), manifest, {})


@pytest.fixture
def scene(tmp_path, manifest, undisturbed):
    return Scene(tmp_path, manifest, undisturbed.made, undisturbed)
