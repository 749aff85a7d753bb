"""Runs that differ in numbers alone share a program, which does what it would with them in it."""

import functools

import jax
import numpy as np
import pytest

from moejax.config import Config
from moejax.routing import ROUTERS, update_rates
from moejax.training.optimizer import make_optimizer
from moejax.training.program import build_program
from moejax.training.state import make_graph
from moejax.training.step import train_step
from tests import tiny

SWITCH = tiny.ARMS["switch"]
# Routers whose state moves at a rate: the rate, and another than its default.
RATES = {
    "loss_free": ("bias_rate", 0.05),
    "remoe": ("growth", 2.0),
    "default_moe": ("decay", 0.5),
}


def arm(rate: float = 1e-2, weight: float = 0.01, **model: float) -> Config:
    balance = {"load_balance": weight, "router_z": 0.002}
    return tiny.tiny(
        **{**SWITCH, "balance": balance, "model": model, "optimizer": {"learning_rate": rate}}
    )


def built(config: Config):
    return build_program(config, tiny.VOCABULARY, 2, (jax.devices()[0],))


def routed(name: str, **options: float) -> Config:
    return tiny.tiny(router={"name": name, **options}, moe={"dispatch": "dropless"})


def moved(step, program, config: Config):
    """Weights, losses and the router's state after three steps, from the same first weights."""
    state, losses = program.init(0, tiny.dataset().count_V), []
    for number in range(3):
        batch = tiny.dataset().train_batch(number * config.data.batch, seed=0)
        state, metrics = step(state, program.put(batch))
        losses.append((metrics["loss"], metrics["balance"]))
    return jax.device_get((state.params, losses, state.router_state))


def constant(config: Config):
    """The step whose coefficients are the config's, compiled in."""
    return jax.jit(
        functools.partial(
            train_step,
            graph=make_graph(config, tiny.VOCABULARY),
            config=config,
            optimizer=make_optimizer(config.optimizer, config.train.steps),
        )
    )


@pytest.mark.parametrize("changes", [{}, {"rate": 3e-3, "weight": 0.5}])
def test_an_argument_does_what_a_constant_does(changes) -> None:
    config = arm(**changes)
    program = built(config)
    with jax.set_mesh(program.mesh):
        wanted = moved(constant(config), program, config)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, moved(program.train_step, program, config), wanted)


def test_a_sweep_has_one_program_and_different_results() -> None:
    configs = [arm(), arm(rate=3e-3), arm(weight=0.5), arm(init_scale=0.1)]
    programs = [built(config) for config in configs]
    assert len({id(program.train_step.func) for program in programs}) == 1
    assert len({id(program.eval_step) for program in programs}) == 1
    params = [moved(p.train_step, p, c)[0] for p, c in zip(programs, configs, strict=True)]
    for other in params[1:]:
        apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params[0], other)
        assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.parametrize("name", RATES)
def test_a_state_moves_at_its_rate_in_a_shared_program(name: str) -> None:
    option, value = RATES[name]
    configs = routed(name), routed(name, **{option: value})
    usual, other = (built(config) for config in configs)
    assert usual.train_step.func is other.train_step.func
    found, given = (moved(p.train_step, p, c) for p, c in zip((usual, other), configs, strict=True))
    with jax.set_mesh(other.mesh):
        wanted = moved(constant(configs[1]), other, configs[1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, given, wanted)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found[2], given[2])
    assert max(jax.tree.leaves(apart)) > 1e-9  # ReMoE's strength begins at 1e-8


def test_the_rates_are_all_of_the_catalogues() -> None:
    others = {"deepseek_v3", "quantile_balancing"}
    assert {name for name in ROUTERS if update_rates(name)} == {*RATES, *others}
    assert set(update_rates("quantile_balancing")) == {"ema", "offset"}
    assert update_rates("remoe") == {"growth": 1.2}  # not k, which its route takes too


def test_a_users_own_update_may_branch_on_its_rate() -> None:
    def move(state, stats, *, rate: float = 0.1):
        return state + rate if rate > 0 else state

    own = ROUTERS["loss_free"]._replace(update=move)
    config = tiny.tiny(router={"name": own, "rate": 0.25})
    program = built(config)
    state = moved(program.train_step, program, config)[2]
    np.testing.assert_allclose(jax.tree.leaves(state)[0], 0.75, rtol=1e-6)


def test_a_loss_that_is_not_there_is_another_program() -> None:
    assert built(arm()).train_step.func is not built(arm(weight=0.0)).train_step.func
    assert set(built(arm(weight=0.0)).train_step.keywords["numbers"].balance) == {"router_z"}
