"""Drives the context of a patched model by what ComfyUI gives its model with every call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sloth_fx.capture.objects import HandedOn
from sloth_fx.dynamo import never_compile, outside_graphs
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.branched import Sharing
from sloth_fx.integrations.comfy.collisions import check_modules, check_patches, function_of, guarded
from sloth_fx.integrations.comfy.handing import Handing
from sloth_fx.integrations.comfy.sampling import Run, moment_of, prediction_of, sigma_of
from sloth_fx.integrations.comfy.source import KEY, Source
from sloth_fx.patch import patch_of

_ON_BLOCKS = "SLG"  # leaves attention as it is, and whole blocks out


class Driver:
    """Before each call of ``model``: sets its context, and takes what is no part of a call out of its options."""

    def __init__(self, model: nn.Module, rewritten: Iterable[str]) -> None:
        patch = patch_of(model)
        self._context = patch.context
        self._run = Run()
        self._sharing = Sharing(model)
        self._handing = Handing()
        self._kinds = frozenset(site.kind for site in patch.report if site.operators)
        self._acted = frozenset(site.path for site in patch.report if set(site.operators) - {_ON_BLOCKS})
        self._owners = {
            path: (owner, function)
            for path in rewritten
            if (function := function_of(owner := model.get_submodule(path))) is not None
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
        sampling, sigma, run = source.base.model_sampling, sigma_of(options), self._run.sigmas(options)
        rows = source.rows_of(options.get("cond_or_uncond") or [0])
        scale = source.scale_for(rows)
        self._context.at(*moment_of(sigma, run, sampling))
        self._context.prediction = prediction_of(sampling)
        self._context.rows = rows
        self._context.guidance_scale = scale
        if source.negative is not None:
            self._tell_negative(source, args, kwargs, first=run is None or run[0] == sigma)
        return self._handing.options(guarded(self._sharing.decide(options), self._kinds))

    def _tell_negative(self, source: Source, args: Any, kwargs: dict[str, Any], *, first: bool) -> None:
        """The negative text, at the first step of a run (weights may have changed) and where the latent is another."""
        latent = args[0] if args else kwargs["x"]
        state = tuple(latent.shape[1:]), latent.dtype, latent.device
        if not first and self._told[1:] == state and self._told[0] is source.negative:
            return
        self._told = source.negative, *state
        self._context.set_negative(**negative_arguments(source.base, source.negative or (), latent, kwargs))


def _drive(driver: Driver, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> HandedOn:
    return driver.drive(model, args, kwargs)


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
    texts = {name: cond for name, cond in named.items() if cond is not None and _is_text(name)}
    found = {name: cond for name, cond in texts.items() if given.get(name) is not None}
    if "context" not in found:
        raise SlothError("the negative of NAG makes no context for this model: it does not read text by attention")
    hiding = [name for name, cond in texts.items() if name not in found and "mask" in name and _hides(cond)]
    if hiding:
        raise SlothError(
            f"the negative of NAG hides some of its tokens by {hiding[0]}, and the positive has none of that: encode "
            "both in the same way, without padding"
        )
    return {name: _cast(cond, latent) for name, cond in found.items()}


def _is_text(name: str) -> bool:
    masks = ("attention_mask", "text_embedding_mask")
    return name == "context" or name.startswith("encoder_hidden_states") or any(each in name for each in masks)


def _hides(mask: Tensor) -> bool:
    """By zeros; or by negative numbers, where it is added to scores."""
    added = mask.is_floating_point() and not (mask > 0).any()
    return bool((mask < 0).any()) if added else not mask.all()


def _tensor(cond: Any) -> Tensor | None:
    value = getattr(cond, "cond", cond)
    return value if isinstance(value, Tensor) else None


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
