"""A comparison: one base config, named variants of it, seeds, and the claims to judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .claims import Claim


@dataclass(frozen=True)
class Suite:
    """Variants are dotted overrides of the base config, e.g. {"router.name": "switch"}.

    `matched` says what all arms have in common, `unmatched` which arms have other active parameters
    or another optimizer or model, and why; `limits` what the scale can and cannot show.
    """

    name: str
    question: str
    scale: str
    variants: Mapping[str, Mapping[str, Any]]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = "dense"
    claims: tuple[Claim, ...] = ()
    matched: str = ""
    unmatched: Mapping[str, str] = field(default_factory=dict)
    limits: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.variants:
            raise ValueError(
                f"suite {self.name}: baseline {self.baseline!r} is none of "
                f"{', '.join(self.variants)}"
            )
        for what in ("descriptions", "unmatched"):
            if extra := [name for name in getattr(self, what) if name not in self.variants]:
                raise ValueError(f"suite {self.name}: {what} of unknown variants {extra}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"suite {self.name}: seeds {self.seeds} must be distinct and not empty"
            )
        if bad := [name for name in self.variants if not _is_file_name(name)]:
            raise ValueError(f"suite {self.name}: variants {bad} cannot name a directory")
        ids = [claim.id for claim in self.claims]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ValueError(f"suite {self.name}: claims {twice} are there twice")

    def to_json(self) -> dict[str, Any]:
        """What suite.json of the compare directory says; the runner may add "command"."""
        return {
            "name": self.name,
            "scale": self.scale,
            "question": self.question,
            "variants": {name: self.descriptions.get(name, "") for name in self.variants},
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "matched": self.matched,
            "unmatched": dict(self.unmatched),
            "limits": self.limits,
        }


def _is_file_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name
