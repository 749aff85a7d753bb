"""Initial weights: their variance, what arms of one seed share, and the loss they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.tiny import VOCAB, build, named, tiny_config, tokens


def test_layers_start_from_different_weights() -> None:
    leaves = named(build(tiny_config(model__layers=4, moe__every=2))[1])
    for name, a in leaves.items():
        if name.startswith("stacks") and not name.endswith("scale_D"):
            assert not np.array_equal(a[0], a[1]), name
    both = [leaves[f"stacks.0.blocks.{block}.attention.w_query_DHA"] for block in (0, 1)]
    assert not np.array_equal(*both)


def test_arms_of_one_seed_share_what_they_have_in_common() -> None:
    dense, wide = build(tiny_config(moe__experts=0))[1], build(tiny_config(moe__experts=4))[1]
    other = build(tiny_config("expert_choice", moe__experts=4, moe__shared=1))[1]
    dense, wide, other = named(dense), named(wide), named(other)
    common = [name for name in dense if "feed_forward." not in name]
    assert len(common) == 3 + 2 + 4  # embedding, unembedding, final norm; two norms; attention
    for name in common:
        np.testing.assert_array_equal(wide[name], dense[name])
        np.testing.assert_array_equal(other[name], dense[name])
    routers = [name for name in wide if name.endswith(("_DE", "_EDF", "_EFD"))]
    for name in routers:  # and two MoE arms their experts and router, whatever routes
        np.testing.assert_array_equal(other[name], wide[name])


def test_initial_loss_is_that_of_guessing() -> None:
    config = tiny_config(model__dim=64, model__ffn=64)
    logits_BSV, _ = nnx.merge(*build(config))(tokens(0, (4, 8)))
    loss = -jax.nn.log_softmax(logits_BSV[:, :-1])
    loss = jnp.take_along_axis(loss, tokens(0, (4, 8))[:, 1:, None], axis=-1).mean()
    # Logits of unit variance cost about half a nat over ln V.
    assert np.log(VOCAB) - 0.2 < loss < np.log(VOCAB) + 1.0


def test_initial_weights_have_the_configured_variance() -> None:
    # std = sqrt(scale / fan-in); router_scale is a factor on top: sqrt(.01) = .1 of the others.
    config = tiny_config(
        model__dim=64, model__ffn=96, model__init_scale=0.5, moe__router_scale=0.01, moe__shared=1
    )
    leaves = named(build(config)[1])
    fan_in = {
        "embed_VD": 64,
        "unembed_DV": 64,
        "w_query_DHA": 64,
        "w_key_DGA": 64,
        "w_value_DGA": 64,
        "w_out_HAD": 64,
        "w_in_EDF": 64,
        "w_gate_EDF": 64,
        "w_out_EFD": 96,
        "w_in_DF": 64,
        "w_gate_DF": 64,
        "w_out_FD": 96,
        "w_router_DE": 64 / 0.01,
    }
    seen = set()
    for name, a in leaves.items():
        kind = name.split(".")[-1]
        if kind == "scale_D":
            np.testing.assert_array_equal(a, 1.0)
            continue
        std = (0.5 / fan_in[kind]) ** 0.5
        assert float(np.std(a)) == pytest.approx(std, rel=4 / a.size**0.5), name
        assert np.abs(a).max() <= 2 * std / 0.879 + 1e-6, name  # cut at 2 sd of the normal
        seen.add(kind)
    assert seen == set(fan_in)
