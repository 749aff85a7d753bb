"""Configs that an earlier version wrote, in today's keys: old runs stay readable."""

import copy
from typing import Any


def modern(written: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content with its old keys and values replaced."""
    tree = copy.deepcopy(written)
    model, train = tree.get("model", {}), tree.get("train", {})
    if isinstance(model.get("remat"), bool):  # before there was a choice of what is kept
        model["remat"] = "full" if model["remat"] else "none"
    if "record_routing" in train:  # before every N-th step could be traced
        train["trace_every"] = int(train.pop("record_routing"))
    return tree
