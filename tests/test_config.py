"""What is wrong in a config fails at once, in one line with the numbers and the nearest name."""

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from moejax.config import (
    Config,
    ModelConfig,
    MoeConfig,
    RouterConfig,
    default_config,
    override,
    router_config,
)
from moejax.config.older import modern
from moejax.routing import ROUTERS, RouterInput, Routing, hyperparameters, token_choice


def tree(**changes: Any) -> dict[str, Any]:
    """The default config as a plain dict, with 'section__key' set; a bare 'section' is replaced."""
    config = default_config().to_dict()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            config[section] = {**config[section], key: value}
        else:
            config[section] = value
    return config


EC = {"name": "expert_choice", "k": 2}

WRONG = [
    # Unknown keys, at each level.
    ({"modle": {}}, "unknown config key 'modle'; did you mean 'model'"),
    ({"model__layer": 3}, "unknown config key model.layer; did you mean 'model.layers'"),
    ({"moe__capacity": 1.0}, "unknown config key moe.capacity; did you mean 'moe.capacity_factor'"),
    ({"data__sequnce": 8}, "unknown config key data.sequnce; did you mean 'data.sequence'"),
    ({"train__step": 8}, "unknown config key train.step; did you mean 'train.steps'"),
    ({"router__renormalize": True}, "no option 'renormalize'; did you mean 'renormalise'"),
    ({"router__name": "switch_"}, "unknown router 'switch_'; did you mean 'switch'"),
    (
        {"balance": {"load_balnce": 0.1}},
        "unknown balance loss 'load_balnce'; did you mean 'load_bal",
    ),
    ({"balance": {"load_balance": -1.0}}, "balance.load_balance=-1.0 must not be negative"),
    # Unknown values.
    ({"model__activation": "swilu"}, "unknown model.activation 'swilu'; did you mean 'swiglu'"),
    ({"model__dtype": "float16"}, "unknown model.dtype 'float16'; did you mean"),
    ({"moe__dispatch": "droples"}, "unknown moe.dispatch 'droples'; did you mean 'dropless'"),
    ({"moe__groups": "seq"}, "unknown moe.groups 'seq'; .*known: batch, sequence, position"),
    (
        {"moe__eval_groups": "positions"},
        "unknown moe.eval_groups 'positions'; did you mean 'position'",
    ),
    ({"router__order": "k_mayor"}, "unknown order 'k_mayor'"),
    ({"optimizer__name": "adam"}, "unknown optimizer.name 'adam'; did you mean 'adamw'"),
    ({"optimizer__schedule": "cosin"}, "unknown optimizer.schedule 'cosin'; did you mean 'cosine'"),
    ({"data__name": "stdlb"}, "unknown corpus 'stdlb'; did you mean 'stdlib'"),
    # Wrong types.
    ({"model__layers": "4"}, "model.layers='4' is a str, must be int"),
    ({"model__layers": 4.0}, "model.layers=4.0 is a float, must be int"),
    ({"model__layers": True}, "model.layers=True is a bool, must be int"),
    ({"model__remat": 1}, "model.remat=1 is a int, must be str"),
    ({"model__remat": "ful"}, "unknown model.remat 'ful'; did you mean 'full'"),
    ({"moe__capacity_factor": "1"}, "moe.capacity_factor='1' is a str, must be float or NoneType"),
    ({"router__k": 2.5}, "router.k=2.5 is a float, must be int"),
    ({"router__renormalise": "no"}, "router.renormalise='no' is a str, must be bool"),
    (
        {"balance": {"load_balance": "a lot"}},
        "balance.load_balance='a lot' is a str, must be float",
    ),
    ({"model": 4}, "model=4 is a int, must be a section"),
    ({"router": "topk"}, "router='topk' is a str, must be a section"),
    # Numbers that do not fit together.
    ({"model__layers": 0}, "model.layers=0 must be at least 1"),
    ({"model__dim": 30}, "model.dim=30 is not divisible by model.heads=4"),
    ({"model__kv_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3"),
    ({"model__head_dim": 5}, "even head_dim, got 5"),
    ({"model__init_scale": 0.0}, "model.init_scale=0.0 must be above 0"),
    ({"router__k": 9}, "router.k=9 is more than moe.experts=8"),
    ({"router__k": 0}, "router.k=0 must be at least 1"),
    ({"data__batch": 2**30}, r"tokens of a microbatch make 2\^31 assignments or more"),
    ({"router__k": 1, "router__renormalise": True}, "k=1 cannot be renormalised"),
    ({"moe__every": 3}, "the 4 layers after moe.first_dense=0 are not divisible by moe.every=3"),
    ({"moe__every": 2, "moe__first_dense": 1}, "the 3 layers after moe.first_dense=1"),
    ({"moe__first_dense": 4}, "moe.first_dense=4 leaves .* of model.layers=4"),
    ({"moe__shared": -1}, "moe.shared=-1 must not be negative"),
    ({"moe__capacity_factor": 0.0}, r"moe.capacity_factor=0.0 leaves no slot \(capacity < 1\)"),
    ({"moe__eval_capacity_factor": -1.0}, "moe.eval_capacity_factor=-1.0 leaves no slot"),
    ({"moe__capacity_factor": float("nan")}, "moe.capacity_factor=nan leaves no slot"),
    (
        {"data__batch": 15, "train__accumulation": 2},
        "data.batch=15 is not divisible by train.accum",
    ),
    ({"train__steps": 0}, "train.steps=0 must be at least 1"),
    ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate=0.0 must be above 0"),
    ({"optimizer__decay_fraction": 0.0}, r"optimizer.decay_fraction=0.0 must be in \(0, 1\]"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "only one axis can be -1"),
    ({"mesh": {"expert": 0}}, "sizes are >= 1, or -1"),
    # Expert choice: each group's capacity k x tokens / experts, for the microbatch that routes.
    (
        {"router": EC, "moe__experts": 64, "moe__groups": "position"},
        "groups='position': expert_choice: capacity k x tokens / experts = 2 x 16 / 64 < 1",
    ),
    (
        {"router": EC, "moe__experts": 64, "moe__eval_groups": "position"},
        "groups='position': .* 2 x 16 / 64",
    ),
    (
        {"router": EC, "moe__groups": "position", "train__accumulation": 8},
        "groups='position': .* 2 x 2 / 8",
    ),
    (
        {"router": EC, "moe__groups": "sequence", "data__sequence": 3},
        "groups='sequence': .* 2 x 3 / 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_config_says_what_and_how(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Config.from_dict(tree(**changes))
    assert "\n" not in str(caught.value)


def test_expert_choice_fits_where_the_numbers_do() -> None:
    config = Config.from_dict(tree(router=EC, moe__groups="position", train__accumulation=4))
    assert config.choices == 2  # 2 x 4 / 8 = 1 for each position


def test_configs_of_earlier_versions_still_read() -> None:
    for old, remat, every in ((False, "none", 0), (True, "full", 1)):
        written = tree(model__remat=old, train__record_routing=old)
        read = Config.from_dict(modern(written))
        assert (read.model.remat, read.train.trace_every) == (remat, every)
    assert written["train"]["record_routing"]  # it is left as it was


def test_a_dense_config_asks_nothing_of_the_router() -> None:
    config = Config.from_dict(tree(moe__experts=0, moe__every=3, router__k=9))
    assert (config.moe_layers, config.choices) == (0, 0.0)


@pytest.mark.parametrize("name", ROUTERS)
def test_round_trip(name: str) -> None:
    config = default_config()
    config.router = router_config(name)
    config.moe.capacity_factor = 1.25
    config.data.domains = ("code",)
    config.balance.load_balance = 0.01
    checked = Config.from_dict(config)
    assert Config.from_dict(checked.to_dict()) == checked
    written = json.loads(
        json.dumps(checked.to_dict())
    )  # as in config.json: tuples come back as lists
    again = Config.from_dict(written)
    assert again == checked and hash(again) == hash(checked)
    assert again != Config.from_dict(default_config())


def test_defaults_are_the_dataclasses() -> None:
    shown = Config.from_dict(default_config())
    assert (shown.model, shown.moe) == (ModelConfig(), MoeConfig())
    assert dict(shown.router.options) == hyperparameters("topk")
    whole = Config.from_dict({})
    assert whole == Config() and whole.router.k == shown.router.k == 2


def test_whole_numbers_are_floats_where_a_float_is_due() -> None:
    config = Config.from_dict(tree(moe__capacity_factor=2, optimizer__clip=1))
    assert isinstance(config.moe.capacity_factor, float) and config.optimizer.clip == 1.0


def test_evaluation_may_have_its_own_capacity_and_groups() -> None:
    moe = MoeConfig(capacity_factor=1.25, eval_capacity_factor=2.0, eval_groups="position")
    assert (moe.evaluation().capacity_factor, moe.evaluation().groups) == (2.0, "position")
    plain = MoeConfig(capacity_factor=1.25, groups="sequence")
    assert plain.evaluation() == plain


def test_moe_layers() -> None:
    config = Config.from_dict(tree(model__layers=7, moe__first_dense=1, moe__every=3))
    assert config.moe_layers == 2


def own(r: RouterInput, *, k: int = 3) -> Routing:
    import jax

    weight_TK, expert_TK = jax.lax.top_k(jax.nn.softmax(r.logits_TE), k)
    return token_choice(r, expert_TK, weight_TK, r.logits_TE)


def test_a_function_as_router_is_checked_like_a_name() -> None:
    config = Config.from_dict(tree(router={"name": own}, moe__capacity_factor=0.5))
    assert config.router.k == 3 and config.choices == 3 and config.router.label == "own"
    assert config.leaks  # three choices, k-major, a capacity that binds
    with pytest.raises(ValueError, match="router.k=9 is more than moe.experts=8"):
        Config.from_dict(tree(router={"name": own, "k": 9}))
    with pytest.raises(ValueError, match="router own has no option 'kk'; did you mean 'k'"):
        RouterConfig(own, (("kk", 2),))


def test_override_sets_dotted_keys_on_a_copy() -> None:
    config = default_config()
    changed = override(
        config, {"router.name": "loss_free", "router.bias_rate": 0.1, "moe.every": 2}
    )
    assert isinstance(changed, ConfigDict)
    assert changed.router.to_dict() == {
        "name": "loss_free",
        **hyperparameters("loss_free"),
        "bias_rate": 0.1,
    }
    assert (changed.moe.every, config.moe.every, config.router.name) == (2, 1, "topk")
    assert changed.moe.get_type("capacity_factor") is float  # still to be set by a flag
    for key, message in (
        ("moe.evry", "unknown key of moe 'evry'; did you mean 'every'"),
        ("mo.every", "unknown config key 'mo'; did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            override(config, {key: 2})
