"""A guider for diffusers' modular pipelines, whose model has its operators already: it only says which pass this is.

The one module here that imports diffusers, and that nothing else imports: a guider has to be a subclass of theirs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_fx.errors import SlothError
from sloth_fx.patch import patch_of

try:
    from diffusers.configuration_utils import register_to_config
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
    from diffusers.guiders.guider_utils import BaseGuidance
except ImportError as error:
    raise SlothError(f"a guider for modular pipelines needs diffusers 0.35 or later: {error}") from error


class PerturbedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance of a model that was transformed with PAG, SEG, TPG, SLG, SAG or Perturb::

        unet = sloth_fx.transform(pipe.unet, sloth_fx.PAG(scale=3.0))
        pipe.update_components(unet=unet, guider=PerturbedGuidance(guidance_scale=5.0))

    With s, start, stop and rescale as the spec has them it gives u + w * (c - u) + s * (c - p), and without
    classifier-free guidance (guidance_scale=1) c + s * (c - p). There are as many passes as without: the perturbed
    prediction comes with the conditional one. Nothing is hooked at any step; the moment is the step's number over that
    of all steps.

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: as for
            ``ClassifierFreeGuidance``. guidance_rescale goes by the deviation of the guided c.
        prediction: for SAG, what the model predicts: "epsilon", "v_prediction", "sample", "flow" or "edm".

    Raises :class:`SlothError` for a model that was not transformed.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        prediction: str | None = None,
    ) -> None:
        BaseGuidance.__init__(self, start, stop, enabled)  # that of the class above would register a config of its own
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self.prediction = prediction

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Tell the model which of the passes comes."""
        super().prepare_models(denoiser)
        context = patch_of(denoiser).context
        if self._step is not None and self._num_inference_steps is not None:
            context.step(int(self._step), int(self._num_inference_steps))
        if self.prediction is not None:
            context.prediction = self.prediction
        context.guidance_scale = self._weight
        context.rows = ("cond",) if self.is_conditional else ("uncond",)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Whoever calls the model next is not in a pass, nor in this run."""
        super().cleanup_models(denoiser)
        context = patch_of(denoiser).context
        context.auto()
        if self.prediction is not None:
            context.prediction = None
        context.guidance_scale = None
        context.rows = ("cond",)

    @property
    def _weight(self) -> Any:
        """What c is multiplied with in the result; None if it is the result."""
        if not self._is_cfg_enabled():
            return None
        return self.guidance_scale + 1 if self.use_original_formulation else self.guidance_scale
