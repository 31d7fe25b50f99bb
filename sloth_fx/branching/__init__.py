"""Two branches of one call of a model, in which what is equal in both is computed once."""

from sloth_fx.branching import rules  # noqa: F401  (registers them)
from sloth_fx.branching.attention import attend_branches
from sloth_fx.branching.values import Branched, Pair, Tokens, positive_of

__all__ = ["Branched", "Pair", "Tokens", "attend_branches", "positive_of"]
