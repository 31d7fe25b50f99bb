"""Attention in two branches: that of image tokens to image tokens is one for both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.branching.values import Branched, Pair, Part, Tokens, of
from sloth_fx.operators import Attend, attention_with_lse, merge_attention


def attend_branches(
    attend: Attend, query: Any, key: Any, value: Any, mask: Any = None, **options: Any
) -> Tensor | Branched:
    """``attend`` in both branches, for queries, keys and values (B, H, N, D) of which some are :class:`Branched`.

    Attention over two sets of keys is the merge of the attentions over each, by their log-sum-exp. So what both
    branches share of queries and keys is attended once, where ``attend`` is torch's own, or a host's that is told no
    more than a scale, and there is no mask.
    """
    if not any(isinstance(each, Branched) for each in (query, key, value, mask)):
        return attend(query, key, value, *([] if mask is None else [mask]), **options)
    mergeable = (
        (attend is F.scaled_dot_product_attention or hasattr(attend, "sloth_fx_softmax"))
        and mask is None
        and set(options) <= {"scale"}
        and isinstance(key, Tokens)
        and isinstance(value, Tokens)
        and key.sizes == value.sizes
        and not torch.is_grad_enabled()
    )
    if not mergeable:
        return _each(attend, query, key, value, mask, options)
    shared = [index for index, part in enumerate(key.parts) if isinstance(part, Tensor)]
    own = [index for index, part in enumerate(key.parts) if not isinstance(part, Tensor)]
    if not shared or not own:
        return _each(attend, query, key, value, mask, options)
    scale = options.get("scale")
    found: list[Part] = []
    for part in query.parts if isinstance(query, Tokens) else [query]:
        if not isinstance(part, Tensor):
            found.append(_each(attend, part, key, value, None, options))
            continue
        common = attention_with_lse(part, _beside(key, shared, 0), _beside(value, shared, 0), scale)
        texts = [
            attention_with_lse(part, _beside(key, own, branch), _beside(value, own, branch), scale)
            for branch in range(2)
        ]
        found.append(Pair(*(merge_attention(*common, *text) for text in texts)))
    return found[0] if len(found) == 1 else Tokens(found, query.axis)


def _each(attend: Attend, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Pair:
    """Each branch for itself."""
    results = []
    for branch in range(2):
        given = [of(each, branch) for each in (query, key, value)]
        masks = [] if mask is None else [of(mask, branch)]
        results.append(attend(*given, *masks, **of(options, branch)))
    return Pair(*results)


def _beside(tokens: Tokens, parts: list[int], branch: int) -> Tensor:
    found = [of(tokens.parts[index], branch) for index in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=tokens.axis)
