"""What several tests of training share: one compiled program, and one finished run."""

import pytest

from moejax.training.loop import train
from moejax.training.program import build_program
from tests import tiny


@pytest.fixture(scope="session")
def config():
    return tiny.tiny(router=tiny.LOSS_FREE, train={"log_every": 2, "eval_every": 5})


@pytest.fixture(scope="session")
def program(config):
    return build_program(config, tiny.VOCABULARY, len(tiny.dataset().domains))


@pytest.fixture(scope="session")
def finished(config, program, tmp_path_factory):
    """A run on eight simulated devices: its folder and its summary."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(config, workdir, quiet=True)
