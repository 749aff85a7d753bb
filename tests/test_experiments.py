"""Every experiment file: found, checked and traced at all scales; trained for a while when tiny."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from moejax.compare import load_experiment
from moejax.config import Config, override
from moejax.data import Batch
from moejax.model.size import model_size
from moejax.training.loop import train
from moejax.training.optimizer import make_optimizer
from moejax.training.records import read_records
from moejax.training.state import init_state, make_graph
from moejax.training.step import train_step
from tests import tiny

FOLDER = tiny.ROOT / "experiments"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
SCALES = load_experiment(str(FOLDER / "base.py")).SCALES


@functools.cache
def module(name):
    return load_experiment(str(FOLDER / f"{name}.py"))


@functools.cache
def arms(name, scale):
    """Arm -> ConfigDict: the variants of a suite, or the one config of a single run."""
    config = module(name).get_config(scale)
    if not hasattr(module(name), "get_suite"):
        return {"": config}
    variants = module(name).get_suite(scale).variants
    return {arm: override(config, changes) for arm, changes in variants.items()}


ARMS = [
    pytest.param(name, scale, arm, id=f"{name}:{scale} {arm}".strip())
    for name in FILES
    for scale in SCALES
    for arm in arms(name, scale)
]


def test_the_folder_has_the_four_routers_and_their_comparison():
    assert {"base", "switch", "gshard", "expert_choice", "loss_free", "routers"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_what_it_asks_and_how_it_is_run(name):
    lines = (module(name).__doc__ or "").strip().splitlines()
    assert len(lines) > 1
    assert name == "base" or f"experiments/{name}.py:smoke" in module(name).__doc__


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_scale_is_refused(name):
    with pytest.raises(ValueError, match="unknown scale 'huge'; known: smoke, small"):
        module(name).get_config("huge")


@pytest.mark.parametrize(("name", "scale", "arm"), ARMS)
def test_an_arm_is_a_valid_config_and_its_step_can_be_traced(name, scale, arm):
    """Shapes only: nothing is computed or compiled, whatever the scale."""
    config = Config.from_dict(arms(name, scale)[arm])
    assert Config.from_dict(config.to_dict()) == config
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    vocabulary, rows, sequence = tiny.VOCABULARY, config.data.batch, config.data.sequence
    state = jax.eval_shape(lambda: init_state(0, config, vocabulary, optimizer))
    tokens = jax.ShapeDtypeStruct((rows, sequence), jnp.int32)
    valid = jax.ShapeDtypeStruct((rows, sequence), bool)
    batch = Batch(tokens, tokens, tokens, tokens, valid, jax.ShapeDtypeStruct((rows,), jnp.int32))
    step = functools.partial(
        train_step, graph=make_graph(config, vocabulary), config=config, optimizer=optimizer
    )
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(after)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(state)
    ]
    assert metrics["loss"].shape == ()
    assert ("load_LE" in metrics) == (config.moe.experts > 0)


SUITES = [name for name in FILES if hasattr(module(name), "get_suite")]


@pytest.mark.parametrize("scale", SCALES)
def test_the_arms_of_routers_have_equal_active_parameters(scale):
    sizes = {
        arm: model_size(Config.from_dict(config), tiny.VOCABULARY)
        for arm, config in arms("routers", scale).items()
    }
    active = [size.active for size in sizes.values()]
    assert max(active) / min(active) < 1.02, sizes
    total = [size.total for arm, size in sizes.items() if arm != "dense"]
    assert max(total) / min(total) < 1.02, sizes


@pytest.mark.parametrize("name", SUITES)
def test_the_arms_of_a_suite_differ_in_what_they_are_about_alone(name):
    """Same data, steps, optimizer and seed."""
    for scale in SCALES:
        configs = [Config.from_dict(config) for config in arms(name, scale).values()]
        assert len({(c.data, c.optimizer, c.train, c.mesh) for c in configs}) == 1
        assert len(set(configs)) == len(configs)


TRAINED = [
    pytest.param(name, arm, id=f"{name} {arm}".strip())
    for name in FILES
    for arm in arms(name, "smoke")
    if name != "routers" or arm == "dense"  # its other arms are the single runs
]


def test_the_single_runs_are_the_arms_of_the_comparison():
    """So that training each single run has trained each arm."""
    for arm, config in arms("routers", "smoke").items():
        if arm in FILES:
            single = Config.from_dict(arms(arm, "smoke")[""])
            assert Config.from_dict(config) == single, arm


def shrunk(config: ConfigDict) -> Config:
    """The same experiment on the tiny model; experts keep their number relative to the width."""
    experts, wide = config.moe.experts, config.model.ffn
    ffn = (config.moe.ffn or wide) * 32 // wide
    changes = {
        **tiny.SIZES,
        "moe.experts": min(experts, 8),
        "moe.ffn": ffn,
        "moe.dispatch": config.moe.dispatch,
        "data.data_dir": tiny.data_dir(),
        "optimizer.learning_rate": 2e-2,
        "train.steps": 30,
        "train.eval_every": 0,
        "train.log_every": 5,
    }
    return Config.from_dict(override(config, changes))


@pytest.fixture
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(("name", "arm"), TRAINED)
def test_thirty_steps_learn(name, arm, tmp_path: Path, quick_compiler):
    """Far below the 8 bits of a uniform guess, in training and on held-out text."""
    config = shrunk(arms(name, "smoke")[arm])
    summary = train(config, tmp_path / "run", quiet=True)
    losses = [
        r["loss"] for r in read_records(tmp_path / "run/metrics.jsonl") if r["kind"] == "train"
    ]
    assert losses[0] > math.log(256) - 0.5
    assert losses[-1] < math.log(256) - 1.5, losses
    assert summary["bpb"] < 6.0
    regrouped = name == "expert_choice"
    assert ("bpb_as_trained" in summary["eval"]) == regrouped
