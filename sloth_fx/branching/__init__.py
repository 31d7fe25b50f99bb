"""Two branches of one call of a model, in which what is equal in both is computed once."""

from sloth_fx.branching import row_rules, row_shapes, rules, writes  # noqa: F401  (registers them)
from sloth_fx.branching.attention import Read, attend_branches
from sloth_fx.branching.in_place import UnwritableError
from sloth_fx.branching.lengths import Length
from sloth_fx.branching.mode import TwoLengths, run_apart, take_lengths
from sloth_fx.branching.rows import Groups, Rows, apart, by_rows, each_row, parted, picked_groups, rows_in
from sloth_fx.branching.values import Branched, Pair, Tokens, positive_of, together

__all__ = [
    "Branched",
    "Groups",
    "Length",
    "Pair",
    "Read",
    "Rows",
    "Tokens",
    "TwoLengths",
    "UnwritableError",
    "apart",
    "attend_branches",
    "by_rows",
    "each_row",
    "parted",
    "picked_groups",
    "positive_of",
    "rows_in",
    "run_apart",
    "take_lengths",
    "together",
]
