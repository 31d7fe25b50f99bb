"""Drives the context of a patched model by what ComfyUI gives its model with every call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sloth_fx.bind import is_bound
from sloth_fx.capture.objects import HandedOn
from sloth_fx.dynamo import never_compile, outside_graphs
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.collisions import check_modules, check_patches, guarded
from sloth_fx.integrations.comfy.sampling import moment_of, prediction_of
from sloth_fx.patch import patch_of

KEY = "sloth_fx"
"""Under which ``transformer_options`` hold a :class:`Source`."""

_ROWS = {0: "cond", 1: "uncond"}  # of cond_or_uncond; others are groups of somebody else's
_BY_GROUP = ("cond_or_uncond", "uuids")  # options with one entry for each group


class Source:
    """What a patcher says of its model: the model itself, and the negative conditioning of NAG.

    ``negative`` is a CONDITIONING of ComfyUI, a list of (embeddings, dict). ``guides`` tells that rows of the positive
    are guided. Copies of a patcher share this.
    """

    def __init__(self, base: Any, negative: Sequence[Any] | None = None, *, guides: bool = False) -> None:
        self._base = weakref.ref(base)
        self.negative = negative
        self.guides = guides
        self.guidance_scale: float | None = None
        """That of the classifier-free guidance of the run."""

    def __deepcopy__(self, memo: Any) -> Source:
        return self

    @property
    def base(self) -> Any:
        """The model of the patcher, with the sampling that it has now."""
        return self._base()


def note_guidance(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper for ComfyUI's ``outer_sample``: the guider knows its scale, and what it calls the model with does not.

    Perturbed guidance needs it where the positive and the negative are calls of their own. Raises :class:`SlothError`
    for a guider of other conditionings than these, where rows are guided: ``cond_or_uncond`` has their places in its
    own list then.
    """
    guider = executor.class_obj
    source = guider.model_options.get("transformer_options", {}).get(KEY)
    scale = getattr(guider, "cfg", None)
    if isinstance(source, Source):
        conditionings = getattr(guider, "conds", None) or {}
        if source.guides and not set(conditionings) <= {"positive", "negative"}:
            raise SlothError(
                f"{type(guider).__name__} guides by {', '.join(conditionings)}, and which rows of a call are the "
                "positive's is not known: use CFGGuider, BasicGuider or KSampler with guidance of Sloth FX"
            )
        source.guidance_scale = float(scale) if isinstance(scale, (int, float)) and scale > 0 and scale != 1 else None
    return executor(*args, **kwargs)


class Driver:
    """Before each call of ``model``: sets its context, and takes what is no part of a call out of its options."""

    def __init__(self, model: nn.Module) -> None:
        patch = patch_of(model)
        self._context = patch.context
        self._kinds = frozenset(site.kind for site in patch.report if site.operators)
        self._acted = frozenset(site.path for site in patch.report if site.operators)
        self._owners = {
            path: (owner, owner.__dict__["forward"].__func__)
            for path in patch.graphs
            if is_bound(owner := model.get_submodule(path))
        }
        self._told: tuple[Any, ...] = ()
        self._outside = outside_graphs(_drive)
        never_compile(Driver.before_forward)
        model.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)

    def before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook. Raises :class:`SlothError` for a call that the context cannot be set for."""
        options = self._outside(self, model, args, kwargs)
        return args, {**kwargs, "transformer_options": options}

    def drive(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> HandedOn:
        """Set the context for a call with these arguments. Returns the options to make it with."""
        options = kwargs.get("transformer_options") or {}
        source = options.get(KEY)
        if not isinstance(source, Source) or source.base is None:
            raise SlothError(
                "this model is called without the transformer_options of its patcher, which tell the moment of "
                "sampling: a node after those of Sloth FX has replaced them"
            )
        check_modules(model, self._owners)
        check_patches(options, self._acted)
        self._context.at(*moment_of(options, source.base.model_sampling))
        self._context.prediction = prediction_of(source.base.model_sampling)
        groups = options.get("cond_or_uncond") or [0]
        self._context.rows = tuple(_ROWS.get(each, f"group {each}") for each in groups)
        self._context.guidance_scale = source.guidance_scale
        if source.negative is not None:
            self._tell_negative(source, args, kwargs)
        handed = HandedOn(guarded(options, self._kinds))
        handed.of_groups = functools.partial(_of_groups, dict(handed))
        return handed

    def _tell_negative(self, source: Source, args: Any, kwargs: dict[str, Any]) -> None:
        """The negative text, at the first step of a run (weights may have changed) and where the latent is another."""
        latent = args[0] if args else kwargs["x"]
        options = kwargs["transformer_options"]
        run = options.get("sample_sigmas")
        first = run is None or float(run[0]) == float(options["sigmas"].flatten()[0])
        state = tuple(latent.shape[1:]), latent.dtype, latent.device
        if not first and self._told[1:] == state and self._told[0] is source.negative:
            return
        self._told = source.negative, *state
        self._context.set_negative(**negative_arguments(source.base, source.negative or (), latent, kwargs))


def _drive(driver: Driver, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> HandedOn:
    return driver.drive(model, args, kwargs)


def _of_groups(options: Mapping[str, Any], groups: tuple[bool, ...]) -> HandedOn:
    """The options of a call that has some groups of the batch alone: IP-Adapter and its like find the rows of the
    positive by them."""
    kept = {
        name: [each for each, there in zip(options[name], groups, strict=True) if there]
        for name in _BY_GROUP
        if len(options.get(name) or ()) == len(groups)
    }
    return HandedOn({**options, **kept})


def negative_arguments(base: Any, negative: Sequence[Any], latent: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own arguments for the CONDITIONING ``negative``, made as ComfyUI makes them for a sampler.

    Only those that calls of the model have as well (``given``), and that are text: its embeddings, their mask.
    """
    embeddings, more = negative[0]
    rows, columns = latent.shape[-2:]
    made = base.extra_conds(
        **{**more, "cross_attn": embeddings, "noise": latent, "device": latent.device, "prompt_type": "negative"},
        width=columns * 8,
        height=rows * 8,
    )
    named = {"context" if name == "c_crossattn" else name: _tensor(cond) for name, cond in made.items()}
    found = {name: cond for name, cond in named.items() if cond is not None and _is_text(name) and name in given}
    if "context" not in found:
        raise SlothError("the negative of NAG makes no context for this model: it does not read text by attention")
    return {name: _cast(cond, latent) for name, cond in found.items()}


def _is_text(name: str) -> bool:
    return name == "context" or name.endswith("attention_mask") or name.startswith("encoder_hidden_states")


def _tensor(cond: Any) -> Tensor | None:
    value = getattr(cond, "cond", cond)
    return value if isinstance(value, Tensor) else None


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
