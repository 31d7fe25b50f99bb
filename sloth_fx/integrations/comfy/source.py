"""What a patcher of ComfyUI, and the guider that samples with it, say of the calls of its model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

from sloth_fx.errors import SlothError

KEY = "sloth_fx"
"""Under which ``transformer_options`` hold a :class:`Source`."""

_ROLES = {"positive": "cond", "negative": "uncond"}
_PLACES = ("cond", "uncond")  # in the lists of ComfyUI's own sampling


class Source:
    """The model of a patcher, the negative conditioning of NAG, and the guidance that takes what the model predicts.

    ``negative`` is a CONDITIONING of ComfyUI, a list of (embeddings, dict). ``guides`` tells that rows of the positive
    are guided, ``perturbs`` that they are so by perturbed attention. Copies of a patcher share this.
    """

    def __init__(
        self, base: Any, negative: Sequence[Any] | None = None, *, guides: bool = False, perturbs: bool = False
    ) -> None:
        self._base = weakref.ref(base)
        self.negative = negative
        self.guides = guides
        self.perturbs = perturbs
        self.guidance_scale: float | None = None
        """That of the classifier-free guidance of the run, if it is that and no other."""
        self.roles: tuple[str, ...] = ("cond", "uncond")
        """What the conditionings of the present calls are, in their order."""
        self.alone = True
        """Whether there is one conditioning, so that no guidance takes what is predicted."""
        self._guider: weakref.ref[Any] | None = None

    def __deepcopy__(self, memo: Any) -> Source:
        return self

    @property
    def base(self) -> Any:
        """The model of the patcher, with the sampling that it has now."""
        return self._base()

    def rows_of(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """What the rows of a call are, whose ``cond_or_uncond`` holds these numbers."""
        named = dict(enumerate(self.roles))
        return tuple(named.get(number, f"group {number}") for number in numbers)

    def scale_for(self, rows: Sequence[str]) -> float | None:
        """The scale of the guidance that takes a call with these ``rows``; ``None`` where none does, or where it is not
        needed, because the call has all that guidance takes. Raises :class:`SlothError` where it is, and not known."""
        if not self.perturbs or self.alone:
            return None
        whole = rows.count("cond") == 1 < len(rows)
        if self.guidance_scale is None and not whole:
            raise SlothError(
                "guidance of another kind than CFGGuider's, or with a cfg of 0, takes what this call predicts, which "
                f"has the rows {', '.join(rows)} alone: what it makes of guidance by perturbed attention is not known; "
                "use CFGGuider or KSampler without another cfg function, or let both texts be one call"
            )
        return self.guidance_scale

    def note_guider(self, guider: Any) -> None:
        """From now on calls are made by ``guider``."""
        self._guider = weakref.ref(guider)
        self.guidance_scale = _scale_of(guider)

    def note_conditionings(self, given: Sequence[Any]) -> None:
        """Calls with these lists of conditionings are to come. A node may ask for one of the guider's on its own."""
        guider = self._guider() if self._guider is not None else None
        own = {id(each): name for name, each in (getattr(guider, "conds", None) or {}).items() if each is not None}
        names = [_ROLES.get(own.get(id(each), "")) for each in given]
        self.roles = tuple(name or default for name, default in zip(names, _PLACES, strict=False))
        there = sum(each is not None for each in given)
        self.alone = there == 1 and (len(own) < 2 or math.isclose(getattr(guider, "cfg", 1.0), 1.0))


def note_guidance(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper for ComfyUI's ``outer_sample``: the guider knows its scale, and what it calls the model with does not.

    Perturbed guidance needs it where the positive and the negative are calls of their own. Raises :class:`SlothError`
    for a guider of other conditionings than these, where rows are guided: ``cond_or_uncond`` has their places in its
    own list then.
    """
    guider = executor.class_obj
    source = guider.model_options.get("transformer_options", {}).get(KEY)
    if isinstance(source, Source):
        conditionings = getattr(guider, "conds", None) or {}
        if source.guides and not set(conditionings) <= {"positive", "negative"}:
            raise SlothError(
                f"{type(guider).__name__} guides by {', '.join(conditionings)}, and which rows of a call are the "
                "positive's is not known: use CFGGuider, BasicGuider or KSampler with guidance of Sloth FX"
            )
        source.note_guider(guider)
    return executor(*args, **kwargs)


def note_conditionings(executor: Any, model: Any, conds: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """A wrapper for ComfyUI's ``calc_cond_batch``: with a cfg of 1 the negative is left out, and some nodes ask for one
    conditioning at a time."""
    options = kwargs.get("model_options", args[-1] if args else {})
    source = options.get("transformer_options", {}).get(KEY)
    if isinstance(source, Source):
        source.note_conditionings(conds)
    return executor(model, conds, *args, **kwargs)


def _scale_of(guider: Any) -> float | None:
    """Others may change it from step to step, or take something else of the predictions."""
    predicts = getattr(getattr(type(guider), "predict_noise", None), "__qualname__", "")
    if predicts != "CFGGuider.predict_noise" or "sampler_cfg_function" in guider.model_options:
        return None
    return float(guider.cfg) if guider.cfg > 0 else None
