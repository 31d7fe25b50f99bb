"""The host's attention, which notes on the side how much its keys are attended to.

out = attend(query, key, value, mask)      ->      out = self.sloth_perturb_0(query, key, value, mask)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.branching import attend_branches, positive_of
from sloth_fx.errors import SlothError
from sloth_fx.operators import Attend, KeyLayout, split_image
from sloth_fx.operators.self_attention_map import attention_received
from sloth_fx.passes.causal import causal_name
from sloth_fx.perturbation_specs import PerturbationSpec
from sloth_fx.site import Place


class AttentionMap(nn.Module):
    """The host's attention, of query, key and value (B, H, N, D), or (B*H, N, D) with ``folded_heads`` = H.

    While it ``records``, it keeps in ``received`` (B, tokens of the image) how much each image token is attended to by
    the image's tokens, mean over heads, 1 on average. Of a negative text that has a branch of its own nothing is noted.
    ``site`` is named in errors.
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
        self.records = False
        self.received: Tensor | None = None  # no state of the model

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def taken(self) -> Tensor:
        """What was recorded, which is then forgotten. Raises :class:`SlothError` where no call of the model came by."""
        received, self.received = self.received, None
        if received is None:
            raise SlothError(f"{self.site}: this call of the model did not come by, so SAG has no map")
        return received

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, **options: Any) -> Any:
        if causal:
            options[causal_name(self.attend)] = True
        if self.records:
            if causal:
                raise SlothError(
                    f"{self.site}: its map cannot be read here, SAG needs another site: give it with where="
                )
            self.received = self._map(*positive_of((query, key, mask, options)))
        return attend_branches(self.attend, query, key, value, mask, **options)

    def _map(self, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        if self.folded_heads is not None:
            query, key = (torch.unflatten(each, 0, (-1, self.folded_heads)) for each in (query, key))
            if mask is not None and mask.ndim == 3 and mask.shape[0] > 1:
                mask = torch.unflatten(mask, 0, (-1, self.folded_heads))
        tokens = self.layout.tokens
        image = split_image(query, self.query_place, tokens, 2)[1]
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
            mask = mask if mask.shape[2] == 1 else split_image(mask, self.query_place, tokens, 2)[1]
        received = attention_received(image, key, options.get("scale"), mask)
        received = split_image(received, self.key_place, tokens, 1)[1]
        return received / received.mean(1, keepdim=True)

    def extra_repr(self) -> str:
        return str(self.spec)
