"""From run directories to tables, figures and verdicts. Depends on their files only, not on the
trainer.
"""

from .claims import Claim, Verdict, all_of
from .contrasts import contrast, falling, sees_later, steadier, under
from .judges import at_most, less, over, positive, ratio_at_least, similar, sooner
from .metrics import Difference, Either, Quotient, StepsTo, Window
from .reading import load
from .report import write_report
from .results import Results, Run
from .suite import Suite

__all__ = [
    "Claim",
    "Difference",
    "Either",
    "Quotient",
    "Results",
    "Run",
    "StepsTo",
    "Suite",
    "Verdict",
    "Window",
    "all_of",
    "at_most",
    "contrast",
    "falling",
    "less",
    "load",
    "over",
    "positive",
    "ratio_at_least",
    "sees_later",
    "similar",
    "sooner",
    "steadier",
    "under",
    "write_report",
]
