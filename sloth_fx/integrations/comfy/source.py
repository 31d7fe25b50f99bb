"""What a patcher of ComfyUI, and the guider that samples with it, say of the calls of its model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from sloth_fx.errors import SlothError

KEY = "sloth_fx"
"""Under which ``transformer_options`` hold a :class:`Source`."""


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
        self.alone = True
        """Whether what is denoised has one conditioning, so that no guidance takes it."""

    def __deepcopy__(self, memo: Any) -> Source:
        return self

    @property
    def base(self) -> Any:
        """The model of the patcher, with the sampling that it has now."""
        return self._base()

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
        source.guidance_scale = _scale_of(guider)
    return executor(*args, **kwargs)


def note_conditionings(executor: Any, model: Any, conds: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """A wrapper for ComfyUI's ``calc_cond_batch``: with a cfg of 1, the negative is left out."""
    options = kwargs.get("model_options", args[-1] if args else {})
    source = options.get("transformer_options", {}).get(KEY)
    if isinstance(source, Source):
        source.alone = sum(each is not None for each in conds) == 1
    return executor(model, conds, *args, **kwargs)


def _scale_of(guider: Any) -> float | None:
    """Others may change it from step to step, or take something else of the predictions."""
    predicts = getattr(getattr(type(guider), "predict_noise", None), "__qualname__", "")
    if predicts != "CFGGuider.predict_noise" or "sampler_cfg_function" in guider.model_options:
        return None
    return float(guider.cfg) if guider.cfg > 0 else None
