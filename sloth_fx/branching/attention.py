"""Attention in two branches: that of image tokens to image tokens is one for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from sloth_fx.branching.branched import Branched
from sloth_fx.branching.in_place import times_written
from sloth_fx.branching.values import Pair, Part, Tokens, narrowed, of
from sloth_fx.operators import Attend, attention_with_lse, merge_attention


class Read(Pair):
    """What queries that are the same in both branches, those of the image, have read in each."""


def attend_branches(
    attend: Attend, query: Any, key: Any, value: Any, mask: Any = None, **options: Any
) -> Tensor | Branched:
    """``attend`` in both branches, for queries, keys and values (B, H, N, D) of which some are :class:`Branched`.

    Attention over two sets of keys is the merge of the attentions over each, by their log-sum-exp. So what both
    branches share of queries and keys is attended once, where ``attend`` is torch's own, or a host's that is told no
    more than a scale, and where a mask hides the same of it in both.
    """
    if not _differ(query, key, value, mask):
        return attend(query, key, value, *([] if mask is None else [mask]), **options)
    mergeable = (
        (attend is F.scaled_dot_product_attention or hasattr(attend, "sloth_fx_softmax"))
        and set(options) <= {"scale"}
        and isinstance(key, Tokens)
        and isinstance(value, Tokens)
        and key.sizes == value.sizes
        and not torch.is_grad_enabled()
    )
    parts = list(enumerate(key.parts)) if mergeable else []
    shared = [index for index, part in parts if isinstance(part, Tensor)]
    own = [index for index, part in parts if not isinstance(part, Tensor)]
    found: list[Part] = []
    first: Any = 0
    for part in query.parts if isinstance(query, Tokens) else [query]:
        hides = mask if mask is None or mask.shape[-2] == 1 else narrowed(mask, mask.ndim - 2, first, part.shape[-2])
        alike = None
        if isinstance(part, Tensor) and shared and own:
            alike = _hidden_in_both(mask, hides, first, key, shared)
        first = first + part.shape[-2]
        if alike is None or not isinstance(part, Tensor):
            found.append(_read_by(part, _each(attend, part, key, value, hides, options)))
            continue
        scale = options.get("scale")
        image = attention_with_lse(part, _beside(key, shared, 0), _beside(value, shared, 0), scale, *alike)
        texts = [
            attention_with_lse(
                part, _beside(key, own, branch), _beside(value, own, branch), scale, _columns(hides, key, own, branch)
            )
            for branch in range(2)
        ]
        positive, negative = (merge_attention(*image, *text) for text in texts)
        found.append(Read(positive, negative))
    return found[0] if len(found) == 1 else Tokens(found, query.axis)


def attend_apart(attend: Callable[..., Any], query: Any, *given: Any) -> Any:
    """``attend(query, *given)`` in each branch for itself, with all queries at once: which are the image's may matter.
    It returns one tensor, with a token for each query."""
    if not _differ(query, *given):
        return attend(query, *given)
    positive, negative = (attend(of(query, branch), *of(given, branch)) for branch in range(2))
    read = Pair(positive, negative)
    if not isinstance(query, Tokens):
        return _read_by(query, read)
    found, first = [], 0
    for part, size in zip(query.parts, query.sizes, strict=True):
        found.append(_read_by(part, narrowed(read, query.axis, first, size)))
        first = first + size
    return Tokens(found, query.axis)


def _differ(*values: Any) -> bool:
    """Whether some of the values are another in each branch of a text."""
    return any(isinstance(each, (Pair, Tokens)) for each in values)


def _read_by(query: Any, read: Pair) -> Pair:
    return Read(read.positive, read.negative) if isinstance(query, Tensor) else read


def _hidden_in_both(mask: Any, hides: Any, first: Any, key: Tokens, parts: list[int]) -> tuple[Tensor | None] | None:
    """What of some parts of the keys is hidden in both branches alike: a mask, or nothing. ``None`` if that is not so,
    or cannot be known because there is no data. ``hides`` is the ``mask`` for some queries, from the ``first`` on."""
    if mask is None:
        return (None,)
    if mask.ndim != 4 or mask.shape[-1] != key.shape[-2]:
        return None
    one, other = (_columns(hides, key, parts, branch) for branch in range(2))
    if isinstance(mask, Tensor):
        return (one,)
    if torch.compiler.is_compiling() or is_fake(one):
        in_parts = isinstance(mask, Tokens) and mask.axis == 3 and mask.sizes == key.sizes
        return (one,) if in_parts and all(isinstance(mask.parts[index], Tensor) for index in parts) else None
    known = vars(mask).setdefault("hidden", {})  # the same at all sites, and reading it waits for the device
    written = _times_written(mask)
    at = repr((first, hides.shape, key.sizes, parts, written))
    if written is None or at not in known:
        nothing = bool((one if one.dtype == torch.bool else one == 0).all())
        known[at] = (None if nothing else one,) if torch.equal(one, other) else None
    found: tuple[Tensor | None] | None = known[at]
    return found


def _times_written(mask: Any) -> list[int | None] | None:
    """How often each tensor of a mask was written into; ``None`` where torch does not know."""
    parts = mask.parts if isinstance(mask, Tokens) else [mask]
    counts = [times_written(of(part, branch)) for part in parts for branch in range(2)]
    return None if None in counts else counts


def _columns(mask: Any, key: Tokens, parts: list[int], branch: int) -> Any:
    """A mask of some parts of the keys, in one branch."""
    if mask is None:
        return None
    sizes, whole = of(key.sizes, branch), of(mask, branch)
    found = [whole.narrow(-1, sum(sizes[:index]), sizes[index]) for index in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _each(attend: Attend, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]) -> Pair:
    """Each branch for itself."""
    given = [query, key, value, *([] if mask is None else [mask])]
    positive, negative = (attend(*of(given, branch), **of(options, branch)) for branch in range(2))
    return Pair(positive, negative)


def _beside(tokens: Tokens, parts: list[int], branch: int) -> Tensor:
    found = [of(tokens.parts[index], branch) for index in parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=tokens.axis)
