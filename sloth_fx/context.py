"""The timestep context of one patched model: where in the sampling run it is, and what that means for each site."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from sloth_fx.conditioning import Conditioning
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments, ModelAdapter
from sloth_fx.negative import Guide, Negative
from sloth_fx.operators import KeyLayout
from sloth_fx.phases import Phases
from sloth_fx.plan import SitePlan, clocks
from sloth_fx.prediction import Prediction, sigma_of_flow
from sloth_fx.schedule import Moment, NoiseSchedule
from sloth_fx.site import LatentSize

_STEPS = 1000  # how finely a run is looked through, where nobody says
Layouts = tuple[KeyLayout, ...]


class Operator(Protocol):
    """What the context steers: a module that acts according to a layout."""

    layout: KeyLayout

    def set_layout(self, layout: KeyLayout, halves: int) -> None: ...


class TimestepContext:
    """Knows the moment of sampling and sets every operator of its model accordingly.

    Driven by the caller, with :meth:`step` or :meth:`at`, or by itself (:meth:`auto`, the default): then each call of
    the model reads its own timestep argument. The latent's size is read from each call in any case.

    It belongs to one patched model, and a deep copy of that model has a context of its own.
    """

    def __init__(
        self, model: nn.Module, adapter: ModelAdapter, phases: int | None, *, expects_negative: bool = False
    ) -> None:
        self._adapter = adapter
        self._arguments = Arguments(model, adapter)
        self._own_noise = self._noise = adapter.noise
        self._phases = Phases(phases, by_sigma=False) if phases is not None else None
        self._plans: list[SitePlan] = []
        self._operators: list[list[Operator]] = []
        self._clocks: set[str] = set()
        self._driven = False
        self._steps: int | None = None
        self._prediction: Prediction | None = None
        self._sigma_given = False
        self._moment = self._with_sigma(0.0, None)
        self._latent: LatentSize | None = None
        self._given: LatentSize | None = None
        self._shape: tuple[int, ...] = ()
        self._around: tuple[int, int] | None = None
        self._conditioning = Conditioning(expects_negative)
        self._guidance_scale: float | None = None
        self._applied: tuple[Any, ...] | None = None
        self._current: Layouts = ()
        self._sets: dict[Layouts, int] = {}
        self._counted: tuple[Any, ...] | None = None
        self._warned = False

    # What the caller says

    def step(self, i: int, n: int) -> None:
        """Step ``i`` (0 to n - 1) of ``n`` is about to run: progress = i / n. Raises :class:`SlothError` otherwise."""
        index, steps = _integer(i), _integer(n)
        if index is None or steps is None or not 0 <= index < steps:
            raise SlothError(f"step(i={i!r}, n={n!r}): n counts the steps of the run, and i goes from 0 to n - 1")
        self._drive(index / steps, None, (index / steps, (index + 1) / steps))
        self._steps = steps

    def at(self, progress: float, sigma: float | None = None, step: tuple[float, float] | None = None) -> None:
        """The run is at ``progress`` (0: start, 1: end), at noise level ``sigma`` (> 0; default: the model's own
        schedule at that progress); ``step`` is the part of the run that this step covers, as progress, from and to.
        Raises :class:`SlothError` for anything else.
        """
        place, level = _number(progress), None if sigma is None else _number(sigma)
        if not 0 <= place <= 1:
            raise SlothError(f"progress={progress!r}: it goes from 0 (start of sampling) to 1 (its end)")
        if level is not None and not 0 <= level < math.inf:
            raise SlothError(f"sigma={sigma!r}: a noise level is a number from 0")
        if step is not None and not 0 <= _number(step[0]) <= _number(step[1]) <= 1:
            raise SlothError(f"step={step!r}: from and to, progress in 0..1 both")
        self._drive(place, level, step)

    def auto(self, noise: NoiseSchedule | None = None) -> None:
        """Follow the timestep argument of each call again.

        ``noise`` is the schedule that turns timesteps into sigmas; default: the model's own. Specs that need sigma
        (``StepDecay``) raise at the next call of a model whose schedule is not known.
        """
        if noise is not None and not isinstance(noise, NoiseSchedule):
            raise SlothError(f"auto({noise!r:.80}): give a NoiseSchedule, or nothing for the model's own")
        self._noise = noise if noise is not None else self._own_noise
        self._driven = False
        self._steps = None

    @property
    def halves(self) -> int:
        """How many groups of different conditioning the batch holds, one after another (2: unconditional and
        conditional, as pipelines with classifier-free guidance stack them). Images attend to each other
        (``concat_local``, ``concat_global``) within their group only. Default 1."""
        return self._conditioning.groups

    @halves.setter
    def halves(self, halves: int) -> None:
        self._conditioning.count_groups(halves)
        self._apply()

    @property
    def rows(self) -> tuple[str, ...]:
        """What each group of the batch is, one after another: "cond" is guided, others, such as "uncond", are not.
        Setting it sets :attr:`halves` as well. Default: ("cond",)."""
        return self._conditioning.names

    @rows.setter
    def rows(self, rows: Sequence[str]) -> None:
        self._conditioning.name_groups(rows)
        self._apply()

    @property
    def guidance_scale(self) -> float | None:
        """The scale w of classifier-free guidance that takes what calls return whose rows are all "cond": guidance by
        perturbed attention divides its own by it, so that u + w (c - u) + s (c - p) results. ``None``, the default:
        nothing takes it, or the batch has the unconditional rows as well (see :attr:`rows`)."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float | None) -> None:
        if scale is not None and not 0 < _number(scale) < math.inf:
            raise SlothError(f"guidance_scale={scale!r}: that of classifier-free guidance, above 0, or None for none")
        self._guidance_scale = None if scale is None else _number(scale)
        self._apply()

    @property
    def prediction(self) -> Prediction | None:
        """What the model predicts, for SAG: "epsilon", "v_prediction", "sample", "flow" or "edm", or a
        :class:`sloth_fx.prediction.Prediction`. ``None``, the default: nobody told."""
        return self._prediction

    @prediction.setter
    def prediction(self, given: Any) -> None:
        self._prediction = given if given is None or isinstance(given, Prediction) else Prediction(given)
        self._apply()

    def set_negative(self, **arguments: Any) -> None:
        """The negative text of NAG, by the model's own names of arguments: ``set_negative(encoder_hidden_states=...)``.

        An argument is what it is in a call of the model: embeddings (rows, tokens, channels), masks, pooled embeddings;
        with one row for all images, or one for each. The number of tokens may be another than that of the text, if all
        that has a place for each token (masks, ids) is given as well. What is not given (pooled embeddings, sizes) is
        as in each call, but for what keys and values at hand are computed from (a mask): an error names it. Call it
        again when weights that the text passes have changed.

        Raises :class:`SlothError` where nothing guides, and for names that the model does not take. Shapes are checked
        against those of the next call.
        """
        self._conditioning.set_negative(arguments, self._arguments)

    @property
    def branched(self) -> bool:
        """Whether a model that is guided runs in two branches."""
        return any(plan.branching is not None for plan in self._plans)

    @property
    def shares(self) -> bool:
        """Whether these compute once what both have in common."""
        return getattr(self._conditioning.guide, "shares", False)

    def take_negative(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As :meth:`set_negative`, of tensors by the labels that they have in a call."""
        self._conditioning.negative = Negative({}, tensors)

    # What it knows

    @property
    def moment(self) -> Moment:
        """Progress and sigma together."""
        return self._moment

    @property
    def progress(self) -> float:
        """0 at the start of sampling, 1 at its end."""
        return self._moment.progress

    @property
    def sigma(self) -> float | None:
        """The noise level; ``None`` where neither the caller nor the model's schedule tells."""
        return self._moment.sigma

    @property
    def phase(self) -> int:
        """Number of the present set of strides and tiles: with ``phases=K`` the K-th of the run the moment lies in,
        else in order of first appearance. Each is one compiled graph."""
        if self._phases is not None:
            return self._phases.number(self._moment)
        return self._sets.setdefault(self.layouts(), len(self._sets)) if self._latent is not None else 0

    @property
    def driven(self) -> bool:
        """Whether the caller says where the run is; otherwise each call's own timestep does."""
        return self._driven

    def layouts(self) -> Layouts:
        """The layout of every patched site now, in order of execution. Raises before the size of a latent is known."""
        return self._layouts(self._moment)

    def moments(self, steps: int | None = None) -> list[Moment]:
        """One moment for each distinct set of strides and tiles that a run of ``steps`` steps goes through.

        Default: a run through all 1000 timesteps; with ``phases=K``, all K. Their number is the number of graphs that
        ``torch.compile`` makes of the model. Needs the size of the latent, like :meth:`layouts`.
        """
        distinct: dict[Layouts, Moment] = {}
        for moment in self._run(steps):
            distinct.setdefault(self._layouts(moment), moment)
        return list(distinct.values())

    def _run(self, steps: int | None) -> list[Moment]:
        if steps is None and self._phases is not None:
            return [self._phases.middle(phase) for phase in range(self._phases.count)]
        count = _STEPS if steps is None else _integer(steps)
        if count is None or count < 1:
            raise SlothError(f"steps={steps!r}: the number of steps of a run, 1 or more")
        return [self._with_sigma(i / count, None)._replace(step=(i / count, (i + 1) / count)) for i in range(count)]

    def sigma_at(self, progress: float) -> float | None:
        """The noise level at ``progress`` by the model's own schedule; ``None`` where that is not known."""
        return self._with_sigma(progress, None).sigma

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Whatever happens inside, the context is afterwards where it was."""
        state = self._driven, self._steps, self._moment
        try:
            yield
        finally:
            self._driven, self._steps, self._moment = state
            self._apply()

    # How it acts

    def guided_by(self, guide: Guide) -> None:
        """Let ``guide`` bring the negative text into the model."""
        self._conditioning.guide = guide

    @property
    def _guides(self) -> bool:
        here = self._conditioning.guide is not None and any(self._conditioning.rows)
        return here and any(layout.guided for layout in self._current)

    def attach(self, plan: SitePlan, operators: list[Operator]) -> None:
        """Take charge of the ``operators`` of one site."""
        self._plans.append(plan)
        self._operators.append(operators)
        self._clocks |= clocks([plan])
        if self._phases is not None:
            self._phases = replace(self._phases, by_sigma="sigma" in self._clocks)

    def located_with(
        self, model: nn.Module, adapter: ModelAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remember what the call looked like from which the sites are known, and how to read others."""
        self._adapter, self._arguments = adapter, Arguments(model, adapter)
        self._around = self._arguments.around(args, kwargs)

    def try_layouts(self, plans: Iterable[SitePlan], latent: LatentSize) -> None:
        """Compute the layouts that ``plans`` would have now, for the errors that this may raise."""
        if not any("sigma" in clocks([plan]) for plan in plans) or self._moment.sigma is not None:
            for plan in plans:
                plan.layout(self._moment, latent)

    def resize(self, latent: Sequence[int]) -> None:
        """The latent has (rows, columns) or (frames, rows, columns) ``latent``; packed latents count tokens.

        Each call of the model says so by itself, if its arguments do; this serves models whose arguments don't.
        """
        sizes = [_integer(size) for size in latent]
        if len(sizes) not in (2, 3) or any(size is None or size < 1 for size in sizes):
            raise SlothError(f"resize({latent!r}): (rows, columns) or (frames, rows, columns), each 1 or more")
        frames, rows, columns = (1, *map(int, latent))[-3:]
        self._latent = self._given = LatentSize(frames, rows, columns)
        self._apply()

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operators are set for a call with these arguments; it can be asked within a graph."""
        if self._latent is None or not (self._driven or not self._clocks):
            return False
        if self._guides or self._predicts:
            return False  # whether the negative text is at hand cannot be told within a graph
        if self._adapter.ids is not None:  # values, which a graph does not have
            return tuple(self._arguments.latent(args, kwargs).shape[1:]) == self._shape
        return (self._arguments.size(args, kwargs) or self._given) == self._latent

    def observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool) -> None:
        """Before each call of ``model``: read the latent's size and, unless driven, the timestep.

        ``compiled`` tells that this call comes from a compiled module.
        """
        latent = self._arguments.size(args, kwargs) or self._given
        if latent is None:
            raise SlothError(
                "this call does not tell the size of its latent: no argument is a tensor (B, C, ..., H, W), and if "
                "tokens are packed nothing says how they lie; say so with resize((rows, columns)), or register an "
                "adapter (docs/extending.md)"
            )
        around = self._arguments.around(args, kwargs)
        if self._around not in (None, around):
            raise SlothError(
                f"this call packs {around[0]} tokens before and {around[1]} after those of the image, and the model "
                f"was located with {self._around}: transform it with example_inputs like these"
            )
        self._latent = latent
        shape = getattr(self._arguments.latent(args, kwargs), "shape", ())
        self._shape = tuple(shape[1:])
        if not self._driven and (self._clocks or self._predicts):
            self._follow(args, kwargs)
        elif not self._driven and any(plan.draws for plan in self._plans):
            with suppress(SlothError):  # other choices at each step are better, and not needed
                self._follow(args, kwargs)
        if self._driven and self._predicts and not self._sigma_given:  # x0 needs that of this very call
            timestep = _one_number(self._arguments.timestep(args, kwargs))
            sigma = self._with_sigma(self._adapter.progress(timestep), None, timestep).sigma
            self._moment = self._moment._replace(sigma=sigma)
        self._check(self._moment)
        self._apply()
        if self._guides:
            self._conditioning.bring_negative(model, (args, kwargs), self._arguments)
        self._warn_of_recompiles(model, compiled)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = _one_number(self._arguments.timestep(args, kwargs))
        self._moment = self._with_sigma(self._progress(timestep), None, timestep)

    def _progress(self, timestep: float) -> float:
        if self._noise is not None and self._noise is not self._own_noise:
            return min(max(1 - timestep / self._noise.steps, 0.0), 1.0)
        return self._adapter.progress(timestep)

    def _drive(self, progress: float, sigma: float | None, step: tuple[float, float] | None) -> None:
        moment = self._with_sigma(progress, sigma)._replace(step=step)
        self._check(moment)
        self._driven = True
        self._steps = None
        self._moment = moment
        self._sigma_given = sigma is not None
        self._apply()

    def _apply(self) -> None:
        if self._latent is None or self._lacks_sigma(self._moment):
            return  # the next call of the model brings the one, and raises for want of the other
        halves, rows = self._conditioning.groups, self._conditioning.rows
        state = (self._moment, self._latent, halves, rows, self._guidance_scale, self._prediction)
        changed = state != self._applied
        if changed:
            self._current = self.layouts()
            self._sets.setdefault(self._current, len(self._sets))
            self._applied = state
        for plan, layout, operators in zip(self._plans, self._current, self._operators, strict=True):
            for operator in operators:
                if changed or operator.layout is not layout:  # torch.export puts attributes of modules back
                    operator.set_layout(layout, halves)
                if changed and hasattr(operator, "set_rows"):
                    operator.set_rows(rows)
                if changed and plan.draws and hasattr(operator, "set_seed"):
                    operator.set_seed(plan.seed(self._moment))
                if changed and hasattr(operator, "set_prediction"):
                    operator.set_prediction(self._prediction)
                if changed and hasattr(operator, "set_moment"):
                    operator.set_moment(self._moment, self._guidance_scale)

    def _layouts(self, moment: Moment) -> Layouts:
        if self._latent is None:
            raise SlothError("the size of the latent is not known yet: run the patched model once")
        if self._phases is not None:
            moment = self._phases.middle(self._phases.number(moment))
        return tuple(plan.layout(moment, self._latent) for plan in self._plans)

    def _check(self, moment: Moment) -> None:
        if self._lacks_sigma(moment):
            raise SlothError(
                "a spec here needs sigma, and the noise schedule of this model is not known: give it with "
                "at(progress, sigma=...) or auto(NoiseSchedule(...))"
            )

    @property
    def _predicts(self) -> bool:
        """Whether something here needs to know what the model predicts."""
        return any(hasattr(operator, "set_prediction") for operators in self._operators for operator in operators)

    def _lacks_sigma(self, moment: Moment) -> bool:
        return "sigma" in self._clocks and moment.sigma is None

    def _with_sigma(self, progress: float, sigma: float | None, timestep: float | None = None) -> Moment:
        if sigma is None and self._noise is not None:
            sigma = self._noise.sigma((1 - progress) * self._noise.steps if timestep is None else timestep)
        flow = self._prediction is not None and self._prediction.kind in ("flow", "reversed_flow")
        if sigma is None and flow and timestep is not None:
            sigma = sigma_of_flow(self._adapter.progress(timestep))
        return Moment(progress, sigma)

    def _warn_of_recompiles(self, model: nn.Module, compiled: bool) -> None:
        """torch stops compiling in silence after ``recompile_limit`` graphs of one function."""
        state = (self._steps, self._latent, len(self._sets), compiled)
        if self._warned or self._counted == state:
            return
        self._counted = state
        if not compiled and all(module._compiled_call_impl is None for module in model.modules()):
            return
        limit = torch._dynamo.config.recompile_limit
        sets = set(self._sets) if self._steps is None else set(map(self._layouts, self._run(self._steps)))
        # Blocks compiled one by one are one function to torch, whose graphs are the distinct layouts of all of them.
        graphs = len(sets) if compiled else len({layout for each in sets for layout in each})
        if graphs > limit:
            self._warned = True
            warnings.warn(
                f"this schedule goes through {graphs} distinct sets of strides and tiles, each a compiled graph, and "
                f"torch stops compiling after {limit}: transform with phases={limit} or raise "
                "torch._dynamo.config.recompile_limit",
                stacklevel=2,
            )


def _one_number(timestep: Any) -> float:
    if isinstance(timestep, torch.Tensor) and timestep.numel() > 0:
        if torch.compiler.is_exporting() or is_fake(timestep) or timestep.is_meta:
            raise SlothError("the timestep has no value here: drive the context with at(progress)")
        values = set(timestep.flatten().tolist())
        if len(values) > 1:
            raise SlothError(
                f"the timesteps of this batch differ ({min(values):g} to {max(values):g}), so it has no single moment: "
                "drive the context with at(progress), or use schedule=Constant()"
            )
        timestep = values.pop()
    if isinstance(timestep, numbers.Real) and math.isfinite(timestep):
        return float(timestep)
    raise SlothError("this call has no timestep to follow: drive the context with step(i, n) or at(progress)")


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def _number(value: Any) -> float:
    """``value`` as a float, NaN for what is no number; schedulers give tensors of one element."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
