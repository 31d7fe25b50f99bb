"""Two branches of one call of a model, in which what is equal in both is computed once."""

from sloth_fx.branching import elementwise, row_rules, row_shapes, rules, writes  # noqa: F401  (registers them)
from sloth_fx.branching.attention import Read, attend_apart, attend_branches
from sloth_fx.branching.branched import Branched
from sloth_fx.branching.einops import tell_einops
from sloth_fx.branching.images import NoImageError, TellImages
from sloth_fx.branching.in_place import UnwritableError, times_written
from sloth_fx.branching.lengths import Length, both, comparable
from sloth_fx.branching.mode import TwoLengths, calls_of, run_apart, take_lengths
from sloth_fx.branching.rows import Asks, Groups, Rows, apart, by_rows, each_row, parted, picked_groups, rows_in
from sloth_fx.branching.values import Pair, Tokens, positive_of, together

__all__ = [
    "Asks",
    "Branched",
    "Groups",
    "Length",
    "NoImageError",
    "Pair",
    "Read",
    "Rows",
    "TellImages",
    "Tokens",
    "TwoLengths",
    "UnwritableError",
    "apart",
    "attend_apart",
    "attend_branches",
    "both",
    "by_rows",
    "calls_of",
    "comparable",
    "each_row",
    "parted",
    "picked_groups",
    "positive_of",
    "rows_in",
    "run_apart",
    "take_lengths",
    "tell_einops",
    "times_written",
    "together",
]
