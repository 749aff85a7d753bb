"""Other frameworks' losses: their tests' numbers, their values at balance, their coefficients in
ours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import make_plan
from moejax.routing import RouterInput, moe_stats
from moejax.routing.balance import balance_losses, squared_cv
from moejax.routing.conventions import (
    CONVENTIONS,
    convention_loss,
    to_moejax,
    value_at_balance,
)
from moejax.routing.noisy import chance_above
from moejax.routing.token_choice import topk
from tests.oracle import case, check

LAYERS, TOKENS, EXPERTS, K = 2, 16, 4, 2
SIZES = {"sequences": 4, "microbatches": 2, "groups": 2, "workers": 2}


def chosen(logits_LTE: jax.Array, k: int = K) -> jax.Array:
    return jax.lax.top_k(logits_LTE, k)[1]


def table(name: str) -> tuple[dict, jax.Array, jax.Array]:
    """A case of the definition table: itself, its logits, and its choices."""
    found = case(name)
    logits_LTE = jnp.asarray(found["inputs"]["logits_LTE"], jnp.float32)
    return found, logits_LTE, chosen(logits_LTE)


def by_layer(name: str, logits_LTE: jax.Array, expert_LTK: jax.Array, **sizes: int) -> list:
    return [
        convention_loss(name, logits_LTE=logits_TE[None], expert_LTK=expert_TK[None], **sizes)
        for logits_TE, expert_TK in zip(logits_LTE, expert_LTK, strict=True)
    ]


@pytest.mark.parametrize(
    ("definition", "names"),
    [
        ("loss_definitions/switch_top1", "switch gshard mesh_tensorflow praxis vmoe_gshard"),
        ("loss_definitions/switch_top1", "axlearn_top2 hf_switch"),
        ("loss_definitions/switch_top1", "st_moe_pytorch deepspeed_top1 deepspeed_top2 tutel"),
        ("loss_definitions/topk_normalised", "moejax axlearn simply transformer_engine"),
        ("loss_definitions/topk_normalised", "deepseek_moe deepseek_v3"),
        ("loss_definitions/topk_normalised", "megatron_micro megatron_sequence megatron_global"),
        ("loss_definitions/topk_normalised", "megablocks"),
        ("loss_definitions/topk_normalised", "deepspeed_topk olmo_core olmo_core_instance"),
        ("loss_definitions/topk_unnormalised", "flaxformer maxtext marin_grug"),
        ("loss_definitions/topk_unnormalised", "easydel_switch hf_mixtral hf_olmoe"),
        ("loss_definitions/mean_without_E2", "fairscale gshard_paper"),
        ("loss_definitions/local_expert_scaling", "fastmoe"),
        ("loss_definitions/selected_softmax", "nanomoe"),
        ("loss_definitions/importance_cv2_unbiased", "tutel_importance"),
    ],
)
def test_definitions_by_layer(definition: str, names: str) -> None:
    found, logits_LTE, expert_LTK = table(definition)
    for name in names.split():
        got = by_layer(name, logits_LTE, expert_LTK, workers=2)
        check(found, "per_layer_L", got)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("loss_definitions/topk_unnormalised_layers_concatenated", "hf_mixtral"),
        ("loss_definitions/topk_unnormalised_layers_mean", "flaxformer"),
        ("loss_definitions/topk_normalised_layers_mean", "megablocks"),
    ],
)
def test_layers_are_put_together_as_the_framework_does(path: str, name: str) -> None:
    found, logits_LTE, expert_LTK = table(path)
    got = convention_loss(name, logits_LTE=logits_LTE, expert_LTK=expert_LTK)
    check(found, "all_layers", got)


def test_layers_added() -> None:
    found, logits_LTE, expert_LTK = table("loss_definitions/topk_normalised")
    got = convention_loss("megatron_global", logits_LTE=logits_LTE, expert_LTK=expert_LTK)
    assert got == pytest.approx(sum(found["expected"]["per_layer_L"]), rel=1e-6)


def test_sigmoid_probabilities_divided_by_their_sum() -> None:
    found, logits_LTE, expert_LTK = table("loss_definitions/sigmoid_normalised")
    score_LTE = jax.nn.sigmoid(logits_LTE)
    prob_LTE = score_LTE / score_LTE.sum(-1, keepdims=True)
    for name in ("megatron_micro", "olmo_core"):
        got = [
            convention_loss(name, prob_LTE=prob_LTE[i : i + 1], expert_LTK=expert_LTK[i : i + 1])
            for i in range(2)
        ]
        check(found, "per_layer_L", got)


def test_per_sequence() -> None:
    found, logits_LTE, expert_LTK = table("loss_definitions/per_sequence")
    for name in ("megatron_sequence", "olmo_core_instance", "deepseek_v3"):
        check(found, "layer0", by_layer(name, logits_LTE, expert_LTK, sequences=2)[0])


Z = sorted(name for name, row in CONVENTIONS.items() if row.z)


def test_z_losses() -> None:
    found, logits_LTE, _ = table("loss_definitions/z_loss")
    assert {"flaxformer", "megatron_micro", "megablocks", "olmo_core", "hf_switch"} <= set(Z)
    for name in Z:
        got = [convention_loss(name, logits_LTE=a[None], loss="z", sequences=2) for a in logits_LTE]
        check(found, "per_layer_L", got)
    hf = case("balance_losses/hf_switch_router_z_loss")
    flat_LTE = jnp.asarray(hf["inputs"]["logits_GTE"]).reshape(1, 12, 4)
    check(hf, "loss", convention_loss("hf_switch", logits_LTE=flat_LTE, loss="z", sequences=2))


@pytest.mark.parametrize(
    ("path", "name", "key"),
    [
        ("balance_losses/flaxformer_load_balancing_loss", "flaxformer", "experts_TK"),
        ("balance_losses/hf_switch_load_balancing_loss", "hf_switch", "experts_T"),
    ],
)
def test_probabilities_as_given(path: str, name: str, key: str) -> None:
    found = case(path)
    prob_LTE = jnp.asarray(found["inputs"]["probs_TE"])[None]
    expert_LTK = jnp.asarray(found["inputs"][key]).reshape(1, 5, 1)
    check(found, "loss", convention_loss(name, prob_LTE=prob_LTE, expert_LTK=expert_LTK))


def test_router_of_huggingface() -> None:
    found = case("balance_losses/hf_switch_router_forward")
    x_GTD, w_DE = (jnp.asarray(found["inputs"][key]) for key in ("x_GTD", "w_DE"))
    logits_LTE = (x_GTD @ w_DE).reshape(1, 6, 2)
    hf = functools.partial(convention_loss, "hf_switch", logits_LTE=logits_LTE, sequences=2)
    check(found, "aux", hf(expert_LTK=chosen(logits_LTE, 1)))
    check(found, "z", hf(loss="z"))


def test_losses_of_vmoe() -> None:
    found = case("balance_losses/vmoe_losses")
    given = {key: jnp.asarray(a) for key, a in found["inputs"].items()}
    gates_LTE = given["gates_TE"][None]
    loss = functools.partial(convention_loss, prob_LTE=gates_LTE)
    check(found, "gshard", loss("vmoe_gshard", expert_LTK=chosen(gates_LTE, 1)))
    check(found, "importance", loss("vmoe_importance"))
    logits_TE, std = given["load_logits_TE"], float(given["load_noise_std"])
    noisy_TE = logits_TE + given["load_noise_TE"]
    again_TE = chance_above(logits_TE, noisy_TE, std, 2)
    check(found, "load", squared_cv(again_TE.mean(0)))
    noisy = {"logits_LTE": logits_TE[None], "noisy_LTE": noisy_TE[None], "noise_std": std}
    noisy["expert_LTK"] = chosen(noisy_TE[None])
    check(found, "load", convention_loss("vmoe_load", **noisy))
    # The pair is the mean of both, here of the same tokens.
    importance = squared_cv(jax.nn.softmax(logits_TE).sum(0))
    want = (importance + found["expected"]["load"]) / 2
    assert convention_loss("vmoe", **noisy) == pytest.approx(float(want), rel=1e-5)


def test_variation_by_hand() -> None:
    # (1, 2, 3): mean 2, variance 2/3 of E, 1 of E - 1.
    a_E = jnp.asarray([1.0, 2.0, 3.0])
    assert squared_cv(a_E) == pytest.approx(2 / 3 / 4)
    assert squared_cv(a_E, unbiased=True) == pytest.approx(1 / 4)


def balanced() -> dict[str, jax.Array]:
    """Uniform probabilities; in any two tokens of a row every expert is chosen once, in any four
    once at each rank."""
    pairs = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    expert_LTK = jnp.asarray(np.tile(pairs, (LAYERS, TOKENS // 4, 1)), jnp.int32)
    logits_LTE = jnp.zeros((LAYERS, TOKENS, EXPERTS))
    return {"logits_LTE": logits_LTE, "noisy_LTE": logits_LTE, "expert_LTK": expert_LTK}


VALUES = {  # ROUTERS: the value at balance of one layer, where it is not 1
    **dict.fromkeys(["flaxformer", "maxtext", "marin_grug", "easydel_switch", "nanomoe"], K),
    **dict.fromkeys(["hf_mixtral", "hf_olmoe"], K),
    **dict.fromkeys(["vmoe_importance", "vmoe_load", "vmoe", "tutel_importance"], 0),
    **dict.fromkeys(["fairscale", "gshard_paper"], 1 / EXPERTS**2),
    "levanter": 1 / K,
    "easydel_standard": TOKENS,
    "fastmoe": 1 / 2**2,
}
ADDED = "switch mesh_tensorflow vmoe_gshard megatron_micro megatron_sequence megatron_global"


@pytest.mark.parametrize("name", CONVENTIONS)
def test_value_at_balance(name: str) -> None:
    want = VALUES.get(name, 1) * (LAYERS if name in ADDED.split() else 1)
    # First choices alternate 0, 2, 1, 3: balanced over any four tokens, and so over any scope.
    got = convention_loss(name, **balanced(), noise_std=1.0, **SIZES)
    assert got == pytest.approx(want, abs=1e-6)
    sizes = {"tokens": TOKENS, "layers": LAYERS, "workers": 2}
    assert value_at_balance(name, k=K, experts=EXPERTS, **sizes) == pytest.approx(want)


def test_value_of_every_project_at_perfect_balance() -> None:
    found = case("balance_losses/aux_scale_at_perfect_balance")
    given = found["inputs"]
    rows = {"axlearn_topk": "axlearn", "easydel_STANDARD": "easydel_standard"}
    rows |= {"easydel_SWITCH": "easydel_switch"}
    for project in found["expected"]["value"]:
        got = convention_loss(
            rows.get(project, project),
            prob_LTE=jnp.asarray(given["probs_TE"])[None],
            expert_LTK=jnp.asarray(given["experts_TK"])[None],
            sequences=given["sequences"],
        )
        check(found, f"value.{project}", got)


def test_scope_of_balance() -> None:
    """Qiu et al. 2025, 2501.11873: two microbatches, each all on its own expert (E = 2): 2 each,
    1 together. The four sequences are those of two microbatches."""
    expert_LTK = jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1]).reshape(1, 8, 1)
    prob_LTE = jax.nn.one_hot(expert_LTK[..., 0], 2)
    loss = functools.partial(convention_loss, prob_LTE=prob_LTE, expert_LTK=expert_LTK, sequences=4)
    assert loss("megatron_micro", microbatches=2) == pytest.approx(2.0)
    assert loss("megatron_sequence") == pytest.approx(2.0)
    assert loss("megatron_global", microbatches=2) == pytest.approx(1.0)
    assert loss("moejax") == pytest.approx(1.0)
    assert loss("megatron_micro", microbatches=1) == pytest.approx(1.0)


def random_case(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    logits_LTE = jnp.asarray(random.normal(size=(LAYERS, TOKENS, EXPERTS)), jnp.float32)
    valid_T = jnp.asarray(np.arange(TOKENS) % 4 != 3)  # each scope loses as many
    return logits_LTE, chosen(logits_LTE), valid_T


def test_global_scope_has_the_value_and_gradient_of_the_batch() -> None:
    # As many valid tokens in each microbatch: f is common, and the mean of the P is P.
    logits_LTE, expert_LTK, valid_T = random_case()

    def of(name: str):
        def loss(logits_LTE):
            given = {"logits_LTE": logits_LTE, "expert_LTK": expert_LTK, "valid_T": valid_T}
            return convention_loss(name, **given, microbatches=2)

        return jax.value_and_grad(loss)(logits_LTE)

    (ours, our_grad), (theirs, their_grad) = of("moejax"), of("megatron_global")
    assert theirs == pytest.approx(LAYERS * float(ours), rel=1e-6)  # Megatron adds its layers
    np.testing.assert_allclose(their_grad, LAYERS * our_grad, atol=1e-6)
    assert np.abs(our_grad).max() > 1e-3
    assert of("megatron_micro")[0] != pytest.approx(float(theirs), rel=1e-3)


def test_padding_adds_nothing() -> None:
    logits_LTE, expert_LTK, valid_T = random_case()
    junk_LTE = jnp.where(valid_T[None, :, None], logits_LTE, 50.0)
    junk_LTK = jnp.where(valid_T[None, :, None], expert_LTK, 0)
    real = np.flatnonzero(valid_T)
    for name in CONVENTIONS:
        call = functools.partial(convention_loss, name, noise_std=1.0, **SIZES)
        one = call(logits_LTE=junk_LTE, noisy_LTE=junk_LTE, expert_LTK=junk_LTK, valid_T=valid_T)
        alone_LTE = logits_LTE[:, real]
        two = call(logits_LTE=alone_LTE, noisy_LTE=alone_LTE, expert_LTK=expert_LTK[:, real])
        assert one == pytest.approx(float(two), rel=1e-5), name
    # A sequence of padding is no sequence: the mean is over the others.
    last = jnp.arange(TOKENS) < 12
    call = functools.partial(convention_loss, "maxtext")
    one = call(logits_LTE=logits_LTE, expert_LTK=expert_LTK, valid_T=last, sequences=4)
    two = call(logits_LTE=logits_LTE[:, :12], expert_LTK=expert_LTK[:, :12], sequences=3)
    assert one == pytest.approx(float(two), rel=1e-6)


def ours(logits_LTE: jax.Array) -> dict[str, jax.Array]:
    """moejax's own losses of a top-k router, through its statistics."""

    def layer(logits_TE):
        r = RouterInput(logits_TE, jnp.ones(TOKENS, bool))
        routing = topk(r, k=K)
        return moe_stats(r, routing, make_plan(routing, None))

    stats = [layer(logits_TE) for logits_TE in logits_LTE]
    names = ("load_balance", "load_balance_top1", "router_z")
    return balance_losses(jax.tree.map(lambda *a: jnp.stack(a), *stats), dict.fromkeys(names, 1.0))


SAME_AT_BALANCE = ("vmoe", "vmoe_importance", "vmoe_load", "tutel_importance", "nanomoe")


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name not in SAME_AT_BALANCE])
def test_coefficients_add_the_same_to_the_objective(name: str) -> None:
    """One scope, and one layer where the framework concatenates: exactly the same."""
    logits_LTE, expert_LTK, _ = random_case(3)
    if CONVENTIONS[name].layers == "concatenated":
        logits_LTE, expert_LTK = logits_LTE[:1], expert_LTK[:1]
    theirs = functools.partial(convention_loss, name, logits_LTE=logits_LTE, workers=2)
    sizes = {"k": K, "experts": EXPERTS, "tokens": TOKENS, "workers": 2}
    sizes["layers"] = len(logits_LTE)
    ((mine, weight),) = to_moejax(name, 0.02, **sizes).items()
    assert weight * ours(logits_LTE)[mine] == pytest.approx(
        0.02 * float(theirs(expert_LTK=expert_LTK)), rel=1e-5
    )
    if CONVENTIONS[name].z:
        ((mine, weight),) = to_moejax(name, 0.001, loss="z", **sizes).items()
        assert weight * ours(logits_LTE)[mine] == pytest.approx(
            0.001 * float(theirs(loss="z")), rel=1e-5
        )


def test_coefficients_by_hand() -> None:
    assert to_moejax("hf_mixtral", 0.02, k=2, experts=8) == {"load_balance": 0.04}
    assert to_moejax("levanter", 0.01, k=4, experts=64) == {"load_balance": 0.0025}
    assert to_moejax("gshard_paper", 0.64, k=2, experts=8) == {"load_balance_top1": 0.01}
    assert to_moejax("switch", 0.01, k=1, experts=8, layers=6) == {
        "load_balance": pytest.approx(0.06)
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_moejax("hf_mixtrl", 1.0, k=2, experts=8), "did you mean 'hf_mixtral'"),
        (lambda: to_moejax("megatron_micro", 1.0, k=2, experts=8), "adds .* give layers="),
        (lambda: to_moejax("easydel_standard", 1.0, k=2, experts=8), "give tokens="),
        (lambda: to_moejax("fastmoe", 1.0, k=2, experts=8), "give workers="),
        (lambda: to_moejax("vmoe", 1.0, k=2, experts=8, layers=2), "no equal coefficient"),
        (lambda: to_moejax("nanomoe", 1.0, k=2, experts=8), "no equal coefficient"),
        (lambda: to_moejax("praxis", 1.0, k=2, experts=8, loss="z"), "no router z-loss"),
        (lambda: convention_loss("moejax"), "needs prob_LTE or logits_LTE"),
        (lambda: convention_loss("moejax", logits_LTE=jnp.zeros((1, 4, 2))), "needs expert_LTK"),
        (lambda: convention_loss("moejax", loss="z"), "z loss of moejax needs logits_LTE"),
        (lambda: convention_loss("vmoe_load", **balanced()), "noise_std > 0"),
        (
            lambda: convention_loss("maxtext", **balanced(), sequences=3),
            "16 tokens are not divisible into 3",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
