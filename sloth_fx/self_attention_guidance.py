"""Self-attention guidance: what the image most attends to is blurred, and the model asked what it makes of that.

The blurred image is another input, so nothing of the second call can be shared with the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sloth_fx.call_rows import can_be_picked, picked
from sloth_fx.capture.capture import Call
from sloth_fx.errors import SlothError
from sloth_fx.nested import copied, leaves, mapped
from sloth_fx.operators import KeyLayout
from sloth_fx.operators.blur import blur_grid
from sloth_fx.operators.perturbation import guided
from sloth_fx.passes.attention_map import AttentionMap
from sloth_fx.perturbation_specs import SAG
from sloth_fx.perturbed import Perturbed, check_no_cache
from sloth_fx.prediction import Level, Prediction
from sloth_fx.schedule import Moment

_AXES = {3: "bnc", 4: "bchw", 5: "bcthw"}


class SelfAttentionGuidance(Perturbed):
    """Runs the calls of a model a second time while ``spec`` acts, with its latent degraded.

    The rows that are degraded are the unconditional ones, as published, or all if there are none. ``axes`` are those of
    the latent, as its adapter has them; ``flow`` is what the model predicts if it is said to predict a flow.
    """

    def __init__(self, spec: SAG, latent: tuple[str, int], axes: str | None, flow: Prediction) -> None:
        super().__init__(spec, latent)
        self.sag = spec
        self.axes = axes
        self.flow = flow
        self.prediction: Prediction | None = None
        self.numbers = torch.zeros(4, dtype=torch.float64)  # of a Level, and its shift: others are no new graph
        self.trouble: str | None = None
        self.idle = False

    def set_prediction(self, prediction: Prediction | None) -> None:
        """What the model predicts: a flow is one in its own time."""
        self.prediction = self.flow if prediction is not None and prediction.kind == "flow" else prediction

    def set_moment(self, moment: Moment, guidance_scale: float | None) -> None:
        """``guidance_scale`` is that of classifier-free guidance which takes what the model returns."""
        scale = self.spec.scale_at(moment)
        self.scale.fill_(scale)
        self.spreads = guidance_scale is None or guidance_scale == 1
        self.share.fill_(1.0 if guidance_scale is None or self.spreads or all(self.rows) else 1 / (1 - guidance_scale))
        self.trouble = self._trouble(moment, guidance_scale)
        # Without noise there is nothing to steer; of calls that are conditional or not, it steers those that are not.
        self.idle = moment.sigma == 0 or (all(self.rows) and guidance_scale not in (None, 1))
        if scale and moment.sigma and self.prediction is not None:
            level = self.prediction.level(moment.sigma)
            self.numbers.copy_(torch.tensor([*level, level.shift], dtype=torch.float64))

    def _trouble(self, moment: Moment, guidance_scale: float | None) -> str | None:
        """Why a call cannot be guided."""
        if self.prediction is None:
            return (
                "SAG has to know what the model predicts: sloth_fx.attach reads it from the scheduler, otherwise say "
                'it with sloth_fx.context(model).prediction = "epsilon", "v_prediction", "sample", "flow" or "edm"'
            )
        if moment.sigma is None:
            return (
                "SAG has to know the noise level: sloth_fx.attach reads it from the scheduler, otherwise say it with "
                "at(progress, sigma=...) or auto(NoiseSchedule(...)) of the context"
            )
        if not any(self.rows) and guidance_scale in (None, 1):
            return (
                f"SAG guides an unconditional call by s / (1 - w), and guidance_scale w of the context is "
                f"{guidance_scale}: say with which scale, other than 1, classifier-free guidance takes it"
            )
        if sum(self.asked) not in (1, len(self.asked)):
            return (
                f"SAG degrades the unconditional rows, and {sum(self.asked)} of the {len(self.rows)} groups of this "
                "batch are not cond"
            )
        return None

    @property
    def acts(self) -> bool:
        return self.layout.perturbed and not self.idle

    @property
    def asked(self) -> tuple[bool, ...]:
        """For each group of the batch, whether it is degraded."""
        alike = len(set(self.rows)) == 1
        return tuple(alike or not each for each in self.rows)

    def run(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The guided result of ``forward``, that of ``model``."""
        if self.trouble is not None:
            raise SlothError(self.trouble)
        check_no_cache(model, self.spec)
        latent = self.latent_of(args, kwargs)
        batch = self._checked_batch(latent)
        with recording(model) as site:
            result = forward(*copied(args), **copied(kwargs))
        prediction = _prediction_in(result, batch)
        level = Level(*self.numbers[:3])
        axes = self._axes(latent, prediction)
        channel = axes.index("c")
        count = min(latent.shape[channel], prediction.shape[channel])
        x, p = (self._own(each, batch).narrow(channel, 0, count) for each in (latent, prediction))
        received = self._own(site.taken()[:batch], batch)  # rows of a negative text come after those

        precision = torch.promote_types(x.dtype, torch.float32)
        clean = x.to(precision) * level.of_input + p.to(precision) * level.of_prediction
        blurred = self._blurred(clean, received, axes, site)
        moved = (x.to(precision) + level.signal * (blurred - clean)).to(latent.dtype)  # with the noise that it had
        own = self._own(latent, batch)
        degraded = torch.cat([moved, own.narrow(channel, count, own.shape[channel] - count)], channel)
        again, alone = self._asked_again(model, forward, (args, kwargs), batch, latent, degraded)
        other = _prediction_in(again, len(moved) if alone else batch)
        other = (other if alone else self._own(other, batch)).narrow(channel, 0, count)
        # As if that had been said of x: for the same noise, the prediction follows what is clean.
        other = other + (self.numbers[3] * (clean - blurred)).to(other.dtype)
        rest = self._own(prediction, batch).narrow(channel, count, prediction.shape[channel] - count)
        numbers: Any = self.scale, self.share
        scale, share = numbers
        perturbed = torch.cat([other, rest], channel)
        how: Any = {"rescale": self.spec.rescale, "share": share, "spread": self.spreads}
        found = guided(prediction, perturbed, self.asked, scale=scale, **how)
        return mapped(lambda each: found if each is prediction else each, result)

    def _asked_again(
        self, model: nn.Module, forward: Callable[..., Any], call: Call, batch: int, latent: Tensor, degraded: Tensor
    ) -> tuple[Any, bool]:
        """What the model gives for ``degraded`` in the place of these rows of the latent, and whether for these alone.

        All rows are asked once more where the arguments cannot be told apart.
        """
        if not all(self.asked) and not can_be_picked(call, latent):
            groups = list(latent.chunk(len(self.asked)))
            groups[self.asked.index(True)] = degraded
            whole = torch.cat(groups)
            args, kwargs = mapped(lambda each: whole if each is latent else each, call)
            return forward(*args, **kwargs), False
        args, kwargs = mapped(lambda each: degraded if each is latent else picked(each, self.asked, batch), call)
        with self._of_asked(model):
            return forward(*args, **kwargs), True

    def _axes(self, latent: Tensor, prediction: Tensor) -> str:
        axes = self.axes if self.axes is not None and len(self.axes) == latent.ndim else _AXES.get(latent.ndim, "")
        same = [a == b or axis == "c" for a, b, axis in zip(latent.shape, prediction.shape, axes, strict=False)]
        if "c" not in axes or axes[0] != "b" or not (set("hw") <= set(axes) or "n" in axes) or not all(same):
            raise SlothError(
                f"SAG needs a latent with rows and columns, and a prediction like it; here they are "
                f"{tuple(latent.shape)} ({axes or 'of axes unknown'}) and {tuple(prediction.shape)}"
            )
        return axes

    def _blurred(self, clean: Tensor, received: Tensor, axes: str, site: AttentionMap) -> Tensor:
        """``clean`` with what is attended to more than the threshold blurred, frame by frame."""
        layout = site.layout
        picture = clean.movedim(axes.index("c"), 1)
        grid = (layout.frames, *layout.grid)
        if "n" in axes:
            if picture.shape[2] != layout.tokens:
                raise SlothError(
                    f"SAG blurs the latent, and {layout.tokens} of the {picture.shape[2]} tokens packed here are its"
                )
            picture = torch.unflatten(picture, 2, grid)
        elif "t" not in axes:
            picture = picture.unsqueeze(2)
        mask = torch.unflatten(received > self.sag.threshold, 1, grid).unsqueeze(1).to(picture.dtype)
        mask = F.interpolate(mask, picture.shape[2:], mode="nearest")
        sigma = self.sag.blur_sigma
        if sigma == math.inf:
            smooth = picture.mean((-2, -1), keepdim=True).expand(picture.shape)
        else:
            reach = math.ceil(4 * min(sigma, max(picture.shape[-2:])))
            smooth = blur_grid(picture, sigma, (reach, reach))
        mixed = torch.lerp(picture, smooth, mask)
        mixed = mixed.flatten(2) if "n" in axes else mixed if "t" in axes else mixed.squeeze(2)
        return mixed.movedim(1, axes.index("c"))

    def _own(self, tensor: Tensor, batch: int) -> Tensor:
        """The rows that are degraded, of a tensor with a row for each of the batch."""
        found: Tensor = picked(tensor, self.asked, batch)
        return found

    @contextmanager
    def _of_asked(self, model: nn.Module) -> Iterator[None]:
        """While it is entered, the operators of ``model`` know the batch as that of the second call."""
        if len(set(self.rows)) == 1:
            yield
            return
        rows, halves = self.rows, self.halves
        _regroup(model, (False,), 1)
        try:
            yield
        finally:
            _regroup(model, rows, halves)


@contextmanager
def recording(model: nn.Module) -> Iterator[AttentionMap]:
    """While it is entered, the map of ``model`` is read."""
    site = next(module for module in model.modules() if isinstance(module, AttentionMap))
    site.records, site.received = True, None
    try:
        yield site
    finally:
        site.records = False


def _regroup(model: nn.Module, rows: tuple[bool, ...], halves: int) -> None:
    operators: list[Any] = list(model.modules())
    for operator in operators:
        if isinstance(getattr(operator, "layout", None), KeyLayout) and hasattr(operator, "set_layout"):
            operator.set_layout(operator.layout, halves)
            if hasattr(operator, "set_rows"):
                operator.set_rows(rows)


def _prediction_in(result: Any, batch: int) -> Tensor:
    tensors = [each for each in leaves(result) if isinstance(each, Tensor)]
    found = [each for each in tensors if each.is_floating_point() and each.ndim > 2 and len(each) == batch]
    if len(found) != 1:
        raise SlothError(
            f"SAG has to find the prediction among what the model returns: one tensor with {batch} rows, and there are "
            f"{len(found)} ({', '.join(str(tuple(each.shape)) for each in tensors)})"
        )
    return found[0]
