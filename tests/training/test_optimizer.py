"""Learning-rate schedules by hand-computed values, and what each optimizer does to the weights."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import OptimizerConfig
from moejax.training.optimizer import make_optimizer, make_schedule


def rates(at, steps=100, **options):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup=20, **options), steps)
    return [float(schedule(step)) for step in at]


@pytest.mark.parametrize("name", ["cosine", "rsqrt", "wsd", "constant"])
def test_the_warm_up_is_linear_from_zero_to_the_peak(name):
    assert rates([0, 5, 10, 20], schedule=name) == pytest.approx([0.0, 0.25, 0.5, 1.0])


SCHEDULES = [
    # 0.1 + 0.9 (1 + cos(pi t)) / 2 at t = 1/4, 1/2, 1 of the 80 steps that are left
    ("cosine", {40: 0.1 + 0.45 * (1 + 2**-0.5), 60: 0.55, 100: 0.1, 120: 0.1}),
    # sqrt(20 / step)
    ("rsqrt", {80: 0.5, 20: 1.0, 100: 5**-0.5}),
    # constant until 100 - 0.2 x 100, then a line to 0.1
    ("wsd", {79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 120: 0.1}),
    ("constant", {21: 1.0, 100: 1.0}),
]


@pytest.mark.parametrize(("name", "wanted"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_a_schedule_by_hand(name, wanted):
    assert rates(wanted, schedule=name) == pytest.approx(list(wanted.values()), rel=1e-5)


def test_final_and_decay_fraction_are_read():
    assert rates([100], schedule="cosine", final_fraction=0.3) == pytest.approx([0.3])
    # the last half of 100 steps: 50 -> 1, 75 -> 0.5, 100 -> 0
    found = rates([50, 75, 100], schedule="wsd", decay_fraction=0.5, final_fraction=0.0)
    assert found == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_wsd_decays_over_no_more_than_what_the_warm_up_left():
    assert rates([20, 60, 100], schedule="wsd", decay_fraction=1.0) == pytest.approx([1, 0.55, 0.1])


def test_a_warm_up_longer_than_the_run_is_refused_with_both_numbers():
    message = r"optimizer.warmup=20 must end before train.steps=20"
    with pytest.raises(ValueError, match=message):
        make_schedule(OptimizerConfig(warmup=20), 20)


PARAMS = {
    "norm": {"scale_D": jnp.full(4, 2.0)},
    "stacked": {"scale_D": jnp.full((3, 4), 2.0), "w_in_DF": jnp.full((3, 4, 5), 2.0)},
    "embed_VD": jnp.full((6, 4), 2.0),
}


def updates(gradient, steps=1, **options):
    """The last update of `steps` steps with the same gradient everywhere, at a constant rate of
    0.1."""
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.1, warmup=0, schedule="constant", **options), 10
    )
    grads = {
        "norm": {"scale_D": jnp.full(4, gradient)},
        "stacked": {name: jnp.full_like(a, gradient) for name, a in PARAMS["stacked"].items()},
        "embed_VD": jnp.full((6, 4), gradient),
    }
    state = optimizer.init(PARAMS)
    for _ in range(steps):
        update, state = optimizer.update(grads, state, PARAMS)
    return update


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_takes_matrices_and_leaves_norm_scales(name):
    """Without a gradient the update is the decay alone: rate x 0.5 x the weight of 2."""
    update = updates(0.0, name=name, weight_decay=0.5)
    np.testing.assert_allclose(update["stacked"]["w_in_DF"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(update["embed_VD"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    assert not np.any(update["norm"]["scale_D"])
    assert not np.any(update["stacked"]["scale_D"])


def test_adamw_by_hand():
    """One step from zero moments: m = (1-b1) g, v = (1-b2) g^2, both unbiased: rate x g / (|g| +
    eps)."""
    update = updates(3.0, name="adamw", weight_decay=0.0, clip=0.0, eps=1.0)
    np.testing.assert_allclose(update["embed_VD"], -0.1 * 3.0 / (3.0 + 1.0), rtol=1e-5)


def test_b1_and_b2_are_read():
    """After gradients g, then g: still g / sqrt(g^2); so let eps show the second moment's
    debias."""
    slow = make_optimizer(
        OptimizerConfig(warmup=0, schedule="constant", clip=0.0, b1=0.0, b2=0.5), 10
    )
    params = {"w_in_DF": jnp.zeros((1, 1))}
    state = slow.init(params)
    update = None
    for gradient in (1.0, 3.0):
        update, state = slow.update({"w_in_DF": jnp.full((1, 1), gradient)}, state, params)
    # b1 = 0: m = 3. v = 0.5 (0.5 x 1) + 0.5 x 9 = 4.75, over 1 - 0.5^2
    assert update is not None
    np.testing.assert_allclose(update["w_in_DF"], -3e-3 * 3.0 / np.sqrt(4.75 / 0.75), rtol=1e-5)


def test_clipping_is_by_the_global_norm():
    """Sums of squares over all arrays: N entries of g have norm g sqrt(N); eps = 1 makes it
    visible."""
    entries = 4 + 12 + 60 + 24
    clipped = 1.0 / np.sqrt(entries)  # of every entry, whatever the gradient was
    update = updates(50.0, clip=1.0, eps=1.0, weight_decay=0.0)
    np.testing.assert_allclose(update["embed_VD"], -0.1 * clipped / (clipped + 1.0), rtol=1e-4)
    small = 0.5 / np.sqrt(entries)  # below the limit: as it is
    update = updates(small, clip=1.0, eps=1.0, weight_decay=0.0)
    np.testing.assert_allclose(update["embed_VD"], -0.1 * small / (small + 1.0), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_finds_the_minimum_of_a_bowl(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup=5, weight_decay=0.0)
    optimizer = make_optimizer(config, 100)
    target_DF = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    params = {"w_in_DF": jnp.ones((4, 6))}
    state, start = optimizer.init(params), float(jnp.abs(params["w_in_DF"] - target_DF).mean())
    for _ in range(100):
        grads = {"w_in_DF": params["w_in_DF"] - target_DF}
        update, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, update)
    assert float(jnp.abs(params["w_in_DF"] - target_DF).mean()) < 0.1 * start
