"""Routings and plans by hand, and a plan as the rows that the oracles list."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.dispatch import Plan, make_plan
from moejax.routing import RouterInput, Routing, token_choice


def plain_input(logits_TE: jax.Array, **others: object) -> RouterInput:
    """A router's input in which every token is real."""
    logits_TE = jnp.asarray(logits_TE, jnp.float32)
    return RouterInput(logits_TE, jnp.ones(logits_TE.shape[0], bool))._replace(**others)


def chosen(
    expert_TK: np.ndarray, weight_TK: np.ndarray, num_experts: int, order: str = "k_major"
) -> Routing:
    """The routing in which token t chooses expert_TK[t]; order k_major, token_major or bpr."""
    expert_TK, weight_TK = jnp.asarray(expert_TK), jnp.asarray(weight_TK, jnp.float32)
    scores_TE = jnp.zeros((len(expert_TK), num_experts))
    return token_choice(plain_input(scores_TE), expert_TK, weight_TK, scores_TE, order)


def listed(routings: Sequence[Routing]) -> Routing:
    """One routing of several groups of equal size, listed group by group, in global token ids."""
    size = routings[0].scores_TE.shape[0]
    moved = [r._replace(token_N=r.token_N + g * size) for g, r in enumerate(routings)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *moved)


def plan_with(routing: Routing, room: int, groups: int = 1) -> Plan:
    """The plan with exactly `room` slots for an expert in each group."""
    assignments = routing.token_N.shape[0] // groups
    return make_plan(routing, room * routing.scores_TE.shape[1] / assignments, groups)


def kept_rows(plan: Plan, num_tokens: int, num_experts: int, groups: int = 1) -> list[list[float]]:
    """[group, token, expert, slot, weight] of all that fitted, sorted; ids within the group."""
    size, room = num_tokens // groups, plan.slots // groups
    rows = [
        [token // size, token % size, expert, slot - token // size * room, weight]
        for token, expert, slot, weight in zip(
            *(
                np.asarray(a).tolist()
                for a in (plan.token_N, plan.expert_N, plan.slot_N, plan.weight_N)
            ),
            strict=True,
        )
        if expert < num_experts
    ]
    return sorted(rows)


def dropped_rows(routing: Routing, plan: Plan, groups: int = 1) -> list[list[int]]:
    """[group, token, expert, choice] of every assignment that found its expert full, sorted."""
    num_tokens, num_experts = routing.scores_TE.shape
    size = num_tokens // groups
    gone_N = np.asarray((routing.expert_N < num_experts) & (plan.expert_N == num_experts))
    columns = (routing.token_N, routing.expert_N, routing.choice_N)
    rows = np.stack([np.asarray(a) for a in columns], 1)[gone_N]
    return sorted([int(t) // size, int(t) % size, int(e), int(k)] for t, e, k in rows)
