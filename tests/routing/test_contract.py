"""What every router of the catalogue owes: form, load, symmetry, padding, weights, gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import Plan, make_plan, route
from moejax.routers import droppable
from moejax.routing import (
    ROUTERS,
    LayerSize,
    RouterInput,
    Routing,
    combine_TE,
    hyperparameters,
    make_router,
    moe_stats,
    token_keys,
)
from moejax.routing.balance import balance_losses
from moejax.routing.dense_gradient import near_best, smooth_step

TOKENS, EXPERTS = 12, 4
RANDOM = np.random.default_rng(0)
LOGITS_TE = jnp.asarray(RANDOM.normal(size=(TOKENS, EXPERTS)), jnp.float32)
BIAS_E = jnp.asarray([0.3, -0.2, 0.1, -0.1])
VOCAB = 16
TOKEN_T = jnp.asarray(RANDOM.integers(0, VOCAB, TOKENS))
SAME_E = jnp.arange(EXPERTS)
SOME_T = jnp.asarray(RANDOM.random(TOKENS) < 0.6)
ALL_T = jnp.ones(TOKENS, bool)
# Some routers look at further projections of a token; here these are mixtures of its logits.
MIX_EX = jnp.asarray(RANDOM.normal(size=(EXPERTS, 64)), jnp.float32)
COTANGENT_TE = jnp.asarray(RANDOM.normal(size=(TOKENS, EXPERTS)), jnp.float32)
LOSSES = ("load_balance", "load_balance_top1", "router_z")
NOISY = ("importance", "load")
DEVICES = ("device", "communication", "load_balance_sequence")
OWN_LOSSES = {
    "deepseek_moe": DEVICES,
    "deepseek_v2": DEVICES,
    "deepseek_v3": DEVICES,
    "noisy_topk": NOISY,
    "hierarchical": NOISY,
    "vmoe": NOISY,
    "top_p": ("router_entropy",),
}


def state_of(name: str, order_E) -> Any:
    """A state that takes part: not the first one, its experts renamed."""
    state = make_router(name).init(LayerSize(EXPERTS, 8, VOCAB, jnp.arange(VOCAB) + 1.0))
    if state is None:
        return None
    if name == "hash":  # expert order_E[e] of the table has the new name e
        return jnp.argsort(order_E)[state]
    # A state of one number an expert takes part with one that is not 0.
    return jax.tree.map(lambda a: a + BIAS_E[order_E] if a.shape == (EXPERTS,) else a, state)


def extra_of(name: str, logits_TE):
    """Further projections that move with the tokens and with the names of the experts."""
    columns = make_router(name).columns(EXPERTS)
    if not columns:
        return None
    if name == "dselect_k":
        return jnp.dot(logits_TE, MIX_EX[:, :columns])
    if name == "hierarchical":  # two primary logits, two scales of their noise, four scales
        primary_TG = 2 * logits_TE.reshape(-1, 2, 2).sum(-1)
        return jnp.concatenate([primary_TG, primary_TG, 0.7 * logits_TE], axis=1)
    return 0.7 * logits_TE


@functools.partial(jax.jit, static_argnums=0)
def routed(name: str, logits_TE, valid_T, token_T, order_E):
    """The routing without noise, its dense form, and the gradient of a projection of that."""
    router = make_router(name)

    def project(logits_TE):
        r = RouterInput(
            logits_TE,
            valid_T,
            state=state_of(name, order_E),
            token_T=token_T,
            next_T=token_T,
            extra_TX=extra_of(name, logits_TE),
        )
        routing = route(router.route, r, 1, "batch")
        dense_TE = combine_TE(routing)
        return (dense_TE * COTANGENT_TE[: len(dense_TE)]).sum(), (routing, dense_TE)

    grad_TE, (routing, dense_TE) = jax.grad(project, has_aux=True)(logits_TE)
    return routing, dense_TE, grad_TE


@functools.partial(jax.jit, static_argnums=0)
def measured(losses: tuple[str, ...], r: RouterInput, routing: Routing):
    """The statistics when dropless, and the losses; one program for all routers of one form."""
    stats = moe_stats(r, routing, make_plan(routing, None))
    return stats, balance_losses(jax.tree.map(lambda a: a[None], stats), dict.fromkeys(losses, 1.0))


@jax.jit
def planned(routing: Routing) -> Plan:
    return make_plan(routing, 1.0)


def run(name: str, logits_TE, valid_T, token_T=TOKEN_T, order_E=SAME_E):
    """The routing, its dense form, its statistics and its losses."""
    routing, dense_TE, _ = routed(name, logits_TE, valid_T, token_T, order_E)
    losses = (*LOSSES, *OWN_LOSSES.get(name, ()))
    return routing, dense_TE, *measured(losses, RouterInput(logits_TE, valid_T), routing)


# A token's number of experts is not k but a result.
ANY_NUMBER = ("remoe", "dselect_k")
# An expert is known by its number's bits: to rename it is to change the router.
BY_NUMBER = ("dselect_k",)

every_router = pytest.mark.parametrize("name", ROUTERS)


@every_router
def test_a_routing_is_well_formed(name: str) -> None:
    routing, dense_TE, stats, _ = run(name, LOGITS_TE, SOME_T)
    assert routing.token_N.dtype == routing.expert_N.dtype == routing.choice_N.dtype == jnp.int32
    assert routing.weight_N.dtype == routing.scores_TE.dtype == jnp.float32
    token_N, expert_N, weight_N = (np.asarray(a) for a in routing[:3])
    real_N = expert_N < EXPERTS
    assert np.all((token_N >= 0) & (token_N < TOKENS)) and np.all(expert_N[~real_N] == EXPERTS)
    pairs = list(zip(token_N[real_N], expert_N[real_N], strict=True))
    assert len(pairs) == len(set(pairs))  # a token meets an expert once
    # What is computed for its gradient alone weighs nothing.
    assert np.all((weight_N > 0)[real_N] == (np.asarray(routing.choice_N) >= 0)[real_N])
    assert not np.any(weight_N[~real_N])
    assert np.all(np.asarray(SOME_T)[token_N[real_N]])  # padding goes nowhere
    assert not np.any(np.asarray(dense_TE)[~np.asarray(SOME_T)])


@every_router
@pytest.mark.parametrize("valid_T", [ALL_T, SOME_T, jnp.zeros(TOKENS, bool)])
def test_load_counts_every_choice_of_every_real_token(name: str, valid_T) -> None:
    routing, dense_TE, stats, _ = run(name, LOGITS_TE, valid_T)
    real = int(valid_T.sum())
    k = hyperparameters(name)["k"]
    if name in ANY_NUMBER:
        assert int(stats.load_E.sum()) <= real * EXPERTS
    elif ROUTERS[name].chooses == "expert":  # each takes C = ceil(2 x 12 / 4) = 6, or all there are
        assert stats.load_E.tolist() == [min(6, real)] * EXPERTS
    else:
        if name == "top_p":  # as many as each token wants, which are fewer than four for some
            assert real <= int(stats.load_E.sum()) < max(1, k * real)
        else:
            assert int(stats.load_E.sum()) == k * real
        assert int(stats.first_E.sum()) == real
    np.testing.assert_array_equal(stats.load_E, (np.asarray(dense_TE) > 0).sum(0))
    np.testing.assert_array_equal(stats.load_E, stats.kept_E)  # no capacity, no drops
    assert int(stats.tokens) == real


@every_router
def test_a_crowd_drops_where_the_catalogue_says_so(name: str) -> None:
    logits_TE = LOGITS_TE.at[:, 1].add(8.0)
    token_T = jnp.full(TOKENS, 3)  # for hash, the same one
    routing, *_ = routed(name, logits_TE, ALL_T, token_T, SAME_E)
    dropped = int((routing.expert_N < EXPERTS).sum() - planned(routing).load_E.sum())
    # The defaults of some list as many assignments as there are pairs, when experts are four.
    room_for_all = routing.token_N.shape[0] == TOKENS * EXPERTS
    assert (dropped > 0) == (droppable(ROUTERS[name]) and not room_for_all)


@every_router
def test_order_of_tokens_is_nothing_without_a_capacity(name: str) -> None:
    order_T = RANDOM.permutation(TOKENS)
    _, dense_TE, stats, losses = run(name, LOGITS_TE, SOME_T)
    _, moved_TE, moved_stats, moved_losses = run(
        name, LOGITS_TE[order_T], SOME_T[order_T], TOKEN_T[order_T]
    )
    np.testing.assert_allclose(moved_TE, dense_TE[order_T], rtol=1e-6)
    np.testing.assert_array_equal(moved_stats.load_E, stats.load_E)
    for key, value in losses.items():
        np.testing.assert_allclose(moved_losses[key], value, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in BY_NUMBER])
def test_names_of_experts_are_nothing(name: str) -> None:
    # Groups of experts are neighbours: names move within them.
    order_E = np.array([1, 0, 3, 2] if name == "hierarchical" else [2, 0, 3, 1])
    _, dense_TE, stats, losses = run(name, LOGITS_TE, SOME_T)
    _, moved_TE, moved_stats, moved_losses = run(
        name, LOGITS_TE[:, order_E], SOME_T, TOKEN_T, jnp.asarray(order_E)
    )
    np.testing.assert_allclose(moved_TE, dense_TE[:, order_E], rtol=1e-6)
    np.testing.assert_array_equal(moved_stats.load_E, stats.load_E[order_E])
    for key, value in losses.items():
        np.testing.assert_allclose(moved_losses[key], value, rtol=1e-5)


@every_router
def test_padding_changes_nothing_whatever_it_holds(name: str) -> None:
    junk_TE = jnp.asarray(RANDOM.normal(size=LOGITS_TE.shape, scale=100.0), jnp.float32)
    _, dense_TE, stats, losses = run(name, LOGITS_TE, SOME_T)
    filled_TE = jnp.where(SOME_T[:, None], LOGITS_TE, junk_TE)
    _, other_TE, other_stats, other_losses = run(name, filled_TE, SOME_T)
    np.testing.assert_array_equal(other_TE, dense_TE)
    jax.tree.map(np.testing.assert_array_equal, (other_stats, other_losses), (stats, losses))
    # And the losses are those of the real tokens alone, where those choose the same experts.
    if ROUTERS[name].chooses == "token":
        real = np.flatnonzero(SOME_T)
        _, _, alone, alone_losses = run(
            name, LOGITS_TE[real], jnp.ones(len(real), bool), TOKEN_T[real]
        )
        np.testing.assert_array_equal(alone.load_E, stats.load_E)
        for key, value in losses.items():
            np.testing.assert_allclose(alone_losses[key], value, rtol=1e-5)


SIGMOID = ("loss_free", "deepseek_v3", "quantile_balancing", "base", "sinkhorn")
RENORMALISED = ("gshard_top2", "noisy_topk", "deepseek_v3", "token_rounding")


def shares_by_code(logits_TE: jax.Array) -> jax.Array:
    """DSelect-k's for 4 experts: two selectors of two bits, and the selectors' logits."""
    extra_TX = jnp.dot(logits_TE, MIX_EX[:, :6])
    bit_T4 = smooth_step(extra_TX[:, :4], 1.0)
    selector_T2 = jax.nn.softmax(extra_TX[:, 4:])
    total_TE = jnp.zeros(logits_TE.shape)
    for i in (0, 1):
        low_T, high_T = bit_T4[:, 2 * i], bit_T4[:, 2 * i + 1]
        low_TE = jnp.stack([1 - low_T, low_T, 1 - low_T, low_T], 1)
        high_TE = jnp.stack([1 - high_T, 1 - high_T, high_T, high_T], 1)
        total_TE = total_TE + selector_T2[:, i : i + 1] * low_TE * high_TE
    return total_TE


SCORES = {
    **dict.fromkeys(SIGMOID, jax.nn.sigmoid),
    "remoe": jax.nn.relu,
    "dselect_k": shares_by_code,
}


def masked_softmaxes(logits_TE: jax.Array) -> jax.Array:
    """SparseMixer-v2's weights: of the best expert among all near it, then of the second best."""
    rank_TE = jnp.argsort(jnp.argsort(-logits_TE, axis=1), axis=1)
    weight_TE = jnp.zeros(logits_TE.shape)
    for choice in (0, 1):
        left_TE = jnp.where(rank_TE >= choice, logits_TE, -jnp.inf)
        masked_TE = jnp.where(near_best(left_TE, 0.1), left_TE, -jnp.inf)
        weight_TE = jnp.where(rank_TE == choice, jax.nn.softmax(masked_TE), weight_TE)
    return weight_TE


def formula(name: str, logits_TE: jax.Array, chosen_TE: np.ndarray) -> jax.Array:
    """The paper's weights of the chosen pairs, densely."""
    if name == "hash":
        return jnp.asarray(chosen_TE, jnp.float32) + 0 * logits_TE
    if name == "sparsemixer2":
        return masked_softmaxes(logits_TE)
    weight_TE = SCORES.get(name, jax.nn.softmax)(logits_TE) * chosen_TE
    if name in RENORMALISED:
        weight_TE = weight_TE / weight_TE.sum(-1, keepdims=True)
    if name == "deepseek_v3":
        weight_TE = 2.5 * weight_TE
    if name == "densemixer":  # the gradient of all of them, whoever is chosen
        probs_TE = jax.nn.softmax(logits_TE)
        weight_TE = probs_TE + jax.lax.stop_gradient(weight_TE - probs_TE)
    if name == "hierarchical":  # both groups of two, both experts of each
        primary_TG = jax.nn.softmax(2 * logits_TE.reshape(-1, 2, 2).sum(-1))
        inner_TGE = jax.nn.softmax(logits_TE.reshape(-1, 2, 2))
        weight_TE = (primary_TG[:, :, None] * inner_TGE).reshape(-1, EXPERTS)
    return weight_TE


@every_router
def test_weights_and_their_gradient_are_the_papers(name: str) -> None:
    _, dense_TE, grad_TE = routed(name, LOGITS_TE, ALL_T, TOKEN_T, SAME_E)
    chosen_TE = np.asarray(dense_TE) > 0

    def papers(logits_TE):
        return (formula(name, logits_TE, chosen_TE) * COTANGENT_TE).sum()

    np.testing.assert_allclose(dense_TE, formula(name, LOGITS_TE, chosen_TE), 1e-6, 1e-7)
    want_TE = jax.grad(papers)(LOGITS_TE)
    np.testing.assert_allclose(grad_TE, want_TE, atol=1e-6)
    assert (np.abs(want_TE).max() > 0.01) == (name != "hash")  # which learns nothing


@every_router
def test_scores_are_the_affinities_without_bias(name: str) -> None:
    score_TE = SCORES.get(name, jax.nn.softmax)(LOGITS_TE)
    if name == "hierarchical":
        score_TE = formula(name, LOGITS_TE, np.ones((TOKENS, EXPERTS), bool))
    if name == "hash":
        score_TE = jax.nn.one_hot(state_of(name, SAME_E)[TOKEN_T], EXPERTS)
    np.testing.assert_allclose(run(name, LOGITS_TE, ALL_T)[0].scores_TE, score_TE, 1e-6, 1e-7)


@every_router
def test_ties_go_to_the_lowest_index(name: str) -> None:
    # Biases that are alike, too: those of one expert, for all.
    routing, dense_TE, _, _ = run(
        name, jnp.zeros_like(LOGITS_TE), ALL_T, TOKEN_T, jnp.zeros(EXPERTS, int)
    )
    chosen_TE = np.zeros((TOKENS, EXPERTS), bool)
    if ROUTERS[name].chooses == "expert":
        chosen_TE[:6] = True
    elif name == "hash":  # it looks at the token only
        chosen_TE[np.arange(TOKENS), state_of(name, SAME_E)[TOKEN_T]] = True
    elif name != "remoe":  # a relu of 0 chooses nobody
        # Codes in the middle give every expert the same share of a token. Of probabilities 1/4, two
        # reach top_p's p = .4.
        k = {"dselect_k": EXPERTS, "top_p": 2}.get(name, hyperparameters(name)["k"])
        chosen_TE[:, :k] = True
    np.testing.assert_array_equal(np.asarray(dense_TE) > 0, chosen_TE)


def test_combine_is_the_routing_written_out() -> None:
    # Token 0 to experts 2 and 0, token 1 to expert 1, the fourth assignment nowhere (3 experts).
    routing = Routing(
        jnp.array([0, 0, 1, 1]),
        jnp.array([2, 0, 1, 3]),
        jnp.array([0.75, 0.25, 0.5, 0.5]),
        jnp.array([0, 1, 0, 1]),
        jnp.zeros((2, 3)),
    )
    assert combine_TE(routing).tolist() == [[0.25, 0.0, 0.75], [0.0, 0.5, 0.0]]


@pytest.mark.parametrize("name", [n for n, spec in ROUTERS.items() if spec.chooses == "token"])
def test_tokens_choose_alone(name: str) -> None:
    """Ten tokens choose what they choose among twelve, their own noise included."""
    router, keys = make_router(name), jax.random.split(jax.random.key(3), 4)
    r = RouterInput(
        LOGITS_TE,
        ALL_T,
        state=state_of(name, SAME_E),
        token_T=TOKEN_T,
        next_T=TOKEN_T,
        extra_TX=extra_of(name, LOGITS_TE),
    )

    def last_ten(first: int, key: jax.Array | None) -> jax.Array:
        key_T = None if key is None else token_keys(key, 12)
        of_tokens = jax.tree.map(lambda a: a[first:], r._replace(state=None, key=key_T))
        routing = router.route(of_tokens._replace(state=r.state))
        return combine_TE(routing)[-10:]

    @jax.jit
    def moved(key: jax.Array | None) -> jax.Array:
        return jnp.abs(last_ten(0, key) - last_ten(2, key)).max()

    assert moved(None) < 1e-6
    assert jax.vmap(moved)(keys).max() < 1e-6
    # One key for all is the same as its keys, and noisy routers do draw.
    drawn = jax.vmap(functools.partial(last_ten, 0))(keys)
    whole = combine_TE(router.route(r._replace(key=keys[0])))[-10:]
    np.testing.assert_allclose(drawn[0], whole, atol=1e-6)
    noisy = {"gshard_top2", "noisy_topk", "hierarchical", "vmoe", "sparsemixer2"}
    assert (jnp.abs(drawn - drawn[:1]).max() > 1e-3) == (name in noisy)
