"""Let the model be asked once more with what an attention reads spoilt.

    out = attend(query, key, value, mask)      ->      out = self.sloth_perturb_0(query, key, value, mask)

Values that come in for both branches (:class:`sloth_fx.branching.Rows`) are attended in the one, spoilt in the other.
Where a negative text has a branch of its own as well, what it reads is spoilt like what the text reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sloth_fx.branching import Asks, apart, attend_apart, attend_branches, rows_in
from sloth_fx.errors import SlothError
from sloth_fx.operators import Attend, KeyLayout, both_masks, join_image, split_image
from sloth_fx.operators.perturbation import blur_queries, identity_attention, joint_identity_attention, shuffle_tokens
from sloth_fx.operators.sequence import image_start
from sloth_fx.passes.causal import causal_name, causal_of
from sloth_fx.passes.core import AttentionCore
from sloth_fx.perturbation_specs import PAG, SAG, SEG, TPG, Perturb, PerturbationSpec
from sloth_fx.site import Place

DEEDS: dict[type[PerturbationSpec], str] = {
    PAG: "each image token reads itself alone in the perturbed branch",
    SEG: "queries of the image blurred in the perturbed branch",
    TPG: "tokens of the image shuffled in the perturbed branch",
    Perturb: "changed by a function in the perturbed branch",
    SAG: "its map tells what of the image is blurred",
}


class PerturbedAttention(nn.Module):
    """The host's attention, and what ``spec`` makes of it where the model is asked once more.

    Takes query, key and value (B, H, N, D), or (B*H, N, D) with ``folded_heads`` = H, and the host's mask.
    ``query_place`` and ``key_place`` tell where the image lies in sequences with others. ``asks`` is what the present
    call of the model is for: the prediction, the perturbed one, or both. ``site`` is named in errors.
    """

    def __init__(
        self,
        site: str,
        attend: Attend,
        spec: PerturbationSpec,
        layout: KeyLayout,
        *,
        folded_heads: int | None,
        query_place: Place,
        key_place: Place,
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.spec = spec
        self.layout = layout
        self.folded_heads = folded_heads
        self.query_place = query_place
        self.key_place = key_place
        self.asks: Asks = "plain"
        self.seed = torch.tensor(0)  # of one number, which goes with tensors of any device; no state of the model

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_seed(self, seed: int) -> None:
        """Choose another order from now on, where tokens are shuffled."""
        self.seed.fill_(seed)

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, **options: Any) -> Any:
        if causal:
            options[causal_name(self.attend)] = True
        given = (query, key, value, mask, options)
        if self.asks == "plain" or not self.layout.perturbed:
            return attend_branches(self.attend, query, key, value, mask, **options)
        if self.asks == "perturbed":
            return attend_apart(self._spoilt, *given)
        if next(rows_in(given), None) is None:
            raise TypeError(f"{self.site} is not reached by the latent")
        return apart(self._whole, self._spoilt, *given)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        return self.attend(query, key, value, *([] if mask is None else [mask]), **options)

    def _spoilt(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        attend = partial(self._whole if self.folded_heads is None else self._folded, options=options)
        if self.folded_heads is not None:
            query, key, value = (torch.unflatten(each, 0, (-1, self.folded_heads)) for each in (query, key, value))
            mask = self._with_heads(mask)
        out = self._perturbed(query, key, value, mask, options, attend)
        if out.shape[:3] != query.shape[:3]:
            raise SlothError(
                f"{self.site}: {type(self.spec).__name__} gives {tuple(out.shape)} for queries {tuple(query.shape)}"
            )
        return out if self.folded_heads is None else out.flatten(0, 1)

    def _perturbed(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], attend: Attend
    ) -> Tensor:
        spec = self.spec
        if isinstance(spec, Perturb):
            found = spec.fn(query, key, value)
            return attend(*found, mask) if isinstance(found, tuple) else found
        if isinstance(spec, PAG):
            return self._identity(query, key, value, mask, options, attend)
        tokens = self._tokens(query)
        if isinstance(spec, SEG):
            before, image, after = split_image(query, self.query_place, tokens, 2)
            blurred = blur_queries(image, self._grid(tokens), spec.blur_sigma, self.layout.frames)
            return attend(join_image(before, blurred, after, 2), key, value, mask)
        before, image, after = split_image(attend(query, key, value, mask), self.query_place, tokens, 2)
        return join_image(before, shuffle_tokens(image, self.seed, 2), after, 2)

    def _identity(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], attend: Attend
    ) -> Tensor:
        heads = query.shape[1]
        if self.key_place.alone:
            if query.shape[2] != value.shape[2]:
                raise SlothError(
                    f"{self.site}: PAG lets each token read itself, and {query.shape[2]} queries meet {value.shape[2]} "
                    "keys here: select other sites with where="
                )
            return identity_attention(value, heads)
        tokens = self._tokens(query)
        before, image, after = split_image(query, self.query_place, tokens, 2)
        start = image_start(self.query_place, query.shape[2], tokens)
        text = torch.cat([before, after], 2)
        rest = None if mask is None else _queries_of(mask, start, tokens, outside=True)
        own = None if mask is None else _queries_of(mask, start, tokens)
        of_form: frozenset[str] = getattr(self.attend, "sloth_fx_of_form", frozenset())
        if self._is_plain_softmax and set(options) <= {"scale", "enable_gqa"} | of_form:
            scale = options.get("scale")
            keys, values = (identity_attention(each, heads) for each in (key, value))
            out = joint_identity_attention(image, keys, values, self.key_place, tokens, scale=scale, mask=own)
        else:
            out = attend(image, key, value, both_masks(own, self._itself_and_others(key, tokens)))
        if text.shape[2] == 0:
            return out
        read = attend(text, key, value, rest)
        return join_image(read[:, :, :start], out, read[:, :, start:], 2)

    def _itself_and_others(self, key: Tensor, tokens: int) -> Tensor:
        """(1, 1, tokens, M) which keys an image token sees."""
        start = image_start(self.key_place, key.shape[2], tokens)
        itself = torch.eye(tokens, dtype=torch.bool, device=key.device)
        return F.pad(itself, (start, key.shape[2] - start - tokens), value=True)[None, None]

    @property
    def _is_plain_softmax(self) -> bool:
        return self.attend is F.scaled_dot_product_attention or hasattr(self.attend, "sloth_fx_softmax")

    def _tokens(self, query: Tensor) -> int:
        tokens: int = query.shape[2] if self.query_place.alone else self.layout.tokens
        return tokens

    def _grid(self, tokens: int) -> tuple[int, int]:
        if tokens != self.layout.tokens:
            rows, columns = self.layout.grid
            raise SlothError(
                f"{self.site}: {tokens} tokens do not fit a grid of {rows} x {columns}, which this latent should "
                "give; give transform example_inputs of this size"
            )
        return self.layout.grid

    def _with_heads(self, mask: Tensor | None) -> Tensor | None:
        if mask is not None and mask.ndim == 3 and mask.shape[0] > 1:
            return torch.unflatten(mask, 0, (-1, self.folded_heads or 1))
        return None if mask is None else mask[(None,) * (4 - mask.ndim)]

    def _folded(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, options: dict[str, Any]
    ) -> Tensor:
        """The host's attention of tensors whose heads have an axis of their own."""
        heads = query.shape[1]
        masks = [] if mask is None else [mask.expand(query.shape[0], heads, -1, -1).flatten(0, 1)]
        out = self.attend(*(each.flatten(0, 1) for each in (query, key, value)), *masks, **options)
        return torch.unflatten(out, 0, (-1, heads))

    def extra_repr(self) -> str:
        return str(self.spec)


def _queries_of(mask: Tensor, start: int, tokens: int, *, outside: bool = False) -> Tensor:
    """The rows (B, H, N, M) of a mask for the image's queries, or for the others."""
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[2] == 1:
        return mask
    if not outside:
        return mask.narrow(2, start, tokens)
    return torch.cat([mask[:, :, :start], mask[:, :, start + tokens :]], 2)


def perturb(graph: fx.Graph, core: AttentionCore, name: str, spec: PerturbationSpec) -> str:
    """Replace ``core`` by a call of ``self.<name>``, a :class:`PerturbedAttention` or an ``AttentionMap``, and say what
    was done."""
    causal = causal_of(core)
    masks = (core.mask, causal) if causal is not False else (core.mask,) if core.mask is not None else ()
    with graph.inserting_before(core.node):
        new = graph.call_module(name, (core.query, core.key, core.value, *masks), core.options)
    core.node.replace_all_uses_with(new)
    graph.erase_node(core.node)
    graph.lint()
    return DEEDS[type(spec)]
