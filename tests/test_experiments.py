"""Every experiment file at every scale: discovered, checked, traced; and one that learns."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import base
from moejax.cli import load_experiment
from moejax.compare import plan, plan_trials, upcycled
from moejax.config import Config
from moejax.data import Batch
from moejax.model.size import model_size
from moejax.training.loop import train
from moejax.training.optimizer import make_optimizer
from moejax.training.records import read_records
from moejax.training.state import init_state, make_graph
from moejax.training.step import eval_step, train_step
from tests import abstract, tiny

FOLDER = Path(__file__).parents[1] / "experiments"
# What defines runs; the others are measurements with a command of their own.
FILES = sorted(path for path in FOLDER.glob("*.py") if "def get_config" in path.read_text())
SUITES = [path for path in FILES if "def get_suite" in path.read_text()]
CATALOGUE = FOLDER / "catalogue.py"
POD = {"data": 32, "fsdp": 8, "expert": 8, "tensor": 2}


@functools.cache
def configs(path, scale):
    """Of a file: its own, and those of all its suite's variants, by name."""
    module = load_experiment(str(path))
    found = {"": Config.from_dict(module.get_config(scale))}
    if hasattr(module, "get_suite"):
        suite = dataclasses.replace(module.get_suite(scale), seeds=(0,))
        planned = plan(suite, module.get_config(scale), [])
        found |= {name: planned[f"{name}/seed0"] for name in suite.variants}
    return found


def test_there_are_experiments():
    assert {path.stem for path in FILES} >= {
        "base",
        "switch",
        "gshard",
        "expert_choice",
        "loss_free",
    }
    assert SUITES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_medium_config_is_checked_and_traced(path):
    """A whole training step and an evaluation, as shapes: nothing compiles or is allocated."""
    found = configs(path, "medium")
    if path in SUITES:  # traced below: there are many
        found = {"": found[""]}
    for name, config in found.items():
        state, metrics = jax.eval_shape(lambda config=config: (evaluated(config), stepped(config)))[
            1
        ]
        check_results(config, state, metrics, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_smoke_config_lowers_for_4096_devices(path):
    """All are laid out, and no expert's weight is copied. Configs of one kind differ in numbers
    only: one of each lowers, and its evaluation is traced."""
    seen = set()
    if path.stem != "catalogue":
        seen = {kind(config) for config in configs(CATALOGUE, "smoke").values()}
    for name, config in configs(path, "smoke").items():
        # Experts or heads that are few lie on few devices; what is left cuts the batch.
        few = {
            "expert": math.gcd(POD["expert"], config.moe.experts or POD["expert"]),
            "tensor": math.gcd(POD["tensor"], config.model.key_value_heads),
        }
        spare = POD["expert"] * POD["tensor"] // math.prod(few.values())
        mesh = {**POD, **few, "data": POD["data"] * spare}
        on_pod = abstract.on_pod(config, mesh, batch=4096)
        matrices = 3 if config.moe.experts else 0  # with both of AdamW's moments
        assert abstract.assert_experts_are_cut(abstract.laid(on_pod)) == 3 * matrices, name
        if kind(config) not in seen:
            seen.add(kind(config))
            jax.eval_shape(lambda config=config: evaluated(config))
            check_results(config, *abstract.lowered(on_pod)[1].out_info, name)


def kind(config):
    """What decides which operations a layer's program has; sizes, rates and weights do not."""
    model, moe = config.model, config.moe
    options = tuple((k, v) for k, v in config.router.options if isinstance(v, str | bool))
    return (
        *(model.activation, model.remat, model.attention, model.qk_norm),
        *(bool(moe.experts), bool(moe.slots), bool(moe.shared), moe.every),
        *(moe.dispatch, moe.capacity_factor is None, moe.groups, moe.eval_groups),
        *(config.router.name, options, config.train.accumulation > 1, config.causal),
    )


def check_results(config, state, metrics, name):
    assert metrics["loss"].shape == () and state.step.shape == (), name
    assert len(metrics.get("load_LE", jnp.zeros(())).shape) == (2 if config.moe.experts else 0)


def fresh(config):
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(
        jnp.zeros((), jnp.int32), config=config, vocab_size=tiny.VOCABULARY, optimizer=optimizer
    )
    shape = (config.data.batch, config.data.sequence)
    ints = jnp.zeros(shape, jnp.int32)
    batch = Batch(ints, ints, ints, ints, jnp.ones(shape, bool), jnp.zeros(shape[0], jnp.int32))
    return state, batch, make_graph(config, tiny.VOCABULARY), optimizer


def evaluated(config):
    state, batch, graph, _ = fresh(config)
    bytes_V = jnp.ones(tiny.VOCABULARY)
    return eval_step(state.params, state.router_state, batch, bytes_V, graph=graph, domains=2)


def stepped(config):
    state, batch, graph, optimizer = fresh(config)
    return train_step(state, batch, graph=graph, config=config, optimizer=optimizer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_scale_is_refused_by_name(path):
    with pytest.raises(ValueError, match=r"unknown scale 'huge'; known: smoke, small, medium"):
        load_experiment(str(path)).get_config("huge")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_opens_with_its_question_and_its_command(path):
    doc = load_experiment(str(path)).__doc__ or ""
    assert path.stem == "base" or f"moejax {verb(path)} " in doc
    assert path.stem == "base" or f"experiments/{path.name}:smoke" in doc


def verb(path):
    return "compare" if path in SUITES else "train"


@pytest.mark.parametrize("scale", base.SCALES)
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_arms_of_a_comparison_have_the_same_active_parameters(path, scale):
    """Those that by intent have not are named, with the reason, and so they are in the report."""
    everything = configs(path, scale)
    unmatched = load_experiment(str(path)).get_suite(scale).unmatched
    active = {
        name: model_size(config, tiny.VOCABULARY).active
        for name, config in everything.items()
        if name and name not in unmatched
    }
    assert active and all(unmatched.values())
    assert max(active.values()) <= 1.04 * min(active.values()), active
    for name, config in everything.items():
        sections = ("data", "mesh", *(() if name in unmatched else ("optimizer", "model")))
        for section in sections:
            assert getattr(config, section) == getattr(everything[""], section), (name, section)
        assert name in unmatched or config.train.steps == everything[""].train.steps


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_claims_are_about_arms_that_exist(path):
    """Judged on no results at all, every claim says what it lacks; and it names only arms."""
    for scale in base.SCALES:
        suite = load_experiment(str(path)).get_suite(scale)
        for claim in suite.claims:
            asked = Asked()
            assert claim.judge(asked).status == "inconclusive", claim.id
            assert asked.arms and asked.arms <= set(suite.variants), (claim.id, asked.arms)


class Asked:
    """Results without a run, which remember whom they were asked for."""

    def __init__(self):
        self.arms = set()

    def of(self, variant):
        self.arms.add(variant)
        return {}


def test_arms_that_start_from_another_are_given_its_folder():
    module = load_experiment(str(FOLDER / "upcycling.py"))
    suite, base_config = module.get_suite("smoke"), module.get_config("smoke")
    found = upcycled(plan(suite, base_config, ["dense", "start"]), suite, Path("out"))
    starts = {name: config.train.upcycle for name, config in found.items()}
    assert starts["start/seed1"] == "out/dense/seed1" and starts["dense/seed1"] == ""
    with pytest.raises(ValueError, match="upcycling has arms that start from other arms"):
        plan_trials(suite, base_config, [], (0.5, 1))


def test_a_short_run_learns(tmp_path):
    """30 steps: from about ln 256 = 5.5 nats a token to far below, on held-out text too."""
    config = tiny.tiny(
        router={"name": "switch"},
        balance={"load_balance": 0.01},
        optimizer={"learning_rate": 2e-2},
        train={"steps": 30, "log_every": 1},
    )
    summary = train(config, tmp_path / "run", quiet=True)
    losses = [r["loss"] for r in read_records(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert losses[0] == pytest.approx(math.log(256), abs=1.0)
    assert losses[-1] < 0.75 * math.log(256)
    assert summary["bpb"] < 0.75 * 8
