"""Follow a function on shapes alone, and on tensors that hold their own places."""

import math

import numpy as np
import torch
from torch import nn

from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.locate.provenance import Provenance
from sloth_fx.locate.tags import places_of

IMAGE = (2, 3, 6, 10)
VIDEO = (2, 3, 5, 6, 10)
SEQUENCE = (3, 15, 4)
TEXT = (3, 7, 4)


class Run:
    """``function`` of shapes alone, followed."""

    def __init__(self, function, *shapes):
        self.attentions, self.linear = [], 0
        skeleton = Skeleton(function if isinstance(function, nn.Module) else nn.Identity())
        inputs = [skeleton.fake(torch.empty(shape, device="meta")) for shape in shapes]
        named = {str(index): tensor for index, tensor in enumerate(inputs)}
        self.provenance = Provenance(named, self.attentions.append, self._count)
        with skeleton.running(), self.provenance:
            self.result = (skeleton.model if isinstance(function, nn.Module) else function)(*inputs)

    def _count(self, right):
        self.linear += 1

    @property
    def places(self):
        found = places_of(self.result)
        return None if found is None else np.array(found)


def numbered(*shapes):
    """Tensors that hold the places of their own elements."""
    sizes = list(map(math.prod, shapes))
    return [each.reshape(shape) for each, shape in zip(torch.arange(sum(sizes)).split(sizes), shapes, strict=True)]
