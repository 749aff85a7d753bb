"""From a name or a function to a router with its hyper-parameters bound."""

import types

import jax
import jax.numpy as jnp
import pytest

from moejax.routing import (
    ROUTERS,
    LayerSize,
    RouterInput,
    RouterSpec,
    Routing,
    hyperparameters,
    make_router,
    token_choice,
)


def nearest(r: RouterInput, *, k: int = 1, sharpness: float = 1.0) -> Routing:
    weight_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(sharpness * r.logits_TE), k)
    return token_choice(r, expert_TK, weight_TK, jax.nn.softmax(r.logits_TE))


R = RouterInput(jnp.asarray([[0.0, 1.0, 2.0]]), jnp.ones(1, bool))
SIZE = LayerSize(4, 8, 16, jnp.ones(16))
R2 = RouterInput(
    jnp.asarray([[0.0, 1.0, 2.0, 3.0]] * 2),
    jnp.ones(2, bool),
    token_T=jnp.arange(2),
    next_T=jnp.arange(2),
)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_built_in_is_made_from_its_own_hyperparameters(name: str) -> None:
    options = hyperparameters(name)
    assert "k" in options
    router = make_router(name, options)
    assert router.spec is ROUTERS[name]
    assert router.spec.chooses in ("token", "expert", "batch") and router.spec.paper
    state = router.init(SIZE)
    assert (state is None) == (router.spec.init is None)
    r = R2._replace(state=state, extra_TX=jnp.zeros((2, router.columns(4))))
    assert router.route(r).scores_TE.shape == (2, 4)


def test_state_rule_takes_its_own_options_only() -> None:
    assert hyperparameters("loss_free")["bias_rate"] == 1e-3
    router = make_router("loss_free", {"k": 1, "bias_rate": 0.5})
    loads = types.SimpleNamespace(load_E=jnp.asarray([[6, 0, 3]]))
    (bias_E,) = router.update(router.init(LayerSize(3))[None], loads)
    assert bias_E.tolist() == [-0.5, 0.5, 0.0]
    # s + b = (.5 - .5, .73 + .5, .88): expert 1, and only it.
    assert router.route(R._replace(state=bias_E)).expert_N.tolist() == [1]
    assert make_router("topk").update("anything", jnp.zeros(3)) == "anything"


def test_a_spec_is_a_router_with_a_state() -> None:
    def zeros(size: LayerSize) -> jax.Array:
        return jnp.zeros(size.experts)

    def count(state: jax.Array, stats: object, *, rate: float = 1.0) -> jax.Array:
        return state + rate * stats.load_E

    mine = RouterSpec(nearest, "token", init=zeros, update=count)
    assert hyperparameters(mine) == {"k": 1, "sharpness": 1.0, "rate": 1.0}
    router = make_router(mine, {"k": 2, "rate": 0.5})
    assert router.spec is mine
    assert router.route(R).expert_N.tolist() == [2, 1]
    loads = types.SimpleNamespace(load_E=jnp.asarray([[6, 0, 3]]))
    assert router.update(router.init(LayerSize(3))[None], loads).tolist() == [[3.0, 0.0, 1.5]]
    with pytest.raises(ValueError, match="router nearest has no option 'rat'; did you mean 'rate'"):
        make_router(mine, {"rat": 2})


def test_a_function_is_a_router() -> None:
    router = make_router(nearest, {"k": 2, "sharpness": 3.0})
    routing = router.route(R)
    assert routing.expert_N.tolist() == [2, 1]
    assert routing.weight_N[0] == pytest.approx(jax.nn.softmax(3.0 * R.logits_TE)[0, 2])
    assert router.init(LayerSize(3)) is None and router.spec is None


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("swich", {}, "unknown router 'swich'; did you mean 'switch'"),
        ("qqq", {}, "unknown router 'qqq'; known: .*expert_choice"),
        (
            "topk",
            {"renormalize": True},
            "router topk has no option 'renormalize'; did you mean 'renorm",
        ),
        ("topk", {"bias_rate": 0.1}, "router topk has no option 'bias_rate'"),
        ("loss_free", {"bias_rat": 0.1}, "did you mean 'bias_rate'"),
        (nearest, {"sharp": 2.0}, "router nearest has no option 'sharp'; did you mean 'sharpness'"),
    ],
)
def test_a_typo_gets_the_nearest_name(router, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(router, options)
