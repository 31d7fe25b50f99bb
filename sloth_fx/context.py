"""The timestep context of one patched model: where in the sampling run it is, and what that means for each site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from sloth_fx.calls import Calls
from sloth_fx.conditioning import Conditioning
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import ModelAdapter
from sloth_fx.negative import Guide, Negative
from sloth_fx.plan import SitePlan, clocks
from sloth_fx.prediction import Prediction
from sloth_fx.recompiles import RecompileWarning
from sloth_fx.schedule import Moment, NoiseSchedule
from sloth_fx.site import LatentSize
from sloth_fx.steering import Layouts, Operator, Setting, Steering
from sloth_fx.timeline import Timeline, number


class TimestepContext:
    """Knows the moment of sampling and sets every operator of its model accordingly.

    Driven by the caller, with :meth:`step` or :meth:`at`, or by itself (:meth:`auto`, the default): then each call of
    the model reads its own timestep argument. The latent's size is read from each call in any case.

    It belongs to one patched model, and a deep copy of that model has a context of its own.
    """

    def __init__(
        self, model: nn.Module, adapter: ModelAdapter, phases: int | None, *, expects_negative: bool = False
    ) -> None:
        self._timeline = Timeline(adapter)
        self._calls = Calls(model, adapter)
        self._conditioning = Conditioning(expects_negative)
        self._guidance_scale: float | None = None
        self._steering = Steering(phases)
        self._recompiles = RecompileWarning()

    # What the caller says

    def step(self, i: int, n: int) -> None:
        """Step ``i`` (0 to n - 1) of ``n`` is about to run: progress = i / n. Raises :class:`SlothError` otherwise."""
        self._drive(self._timeline.step(i, n), steps=int(n))

    def at(self, progress: float, sigma: float | None = None, step: tuple[float, float] | None = None) -> None:
        """The run is at ``progress`` (0: start, 1: end), at noise level ``sigma`` (from 0; default: the model's own
        schedule at that progress); ``step`` is the part of the run that this step covers, as progress, from and to.
        Raises :class:`SlothError` for anything else.
        """
        self._drive(self._timeline.at(progress, sigma, step), sigma_given=sigma is not None)

    def auto(self, noise: NoiseSchedule | None = None) -> None:
        """Follow the timestep argument of each call again.

        ``noise`` is the schedule that turns timesteps into sigmas; default: the model's own. Specs that need sigma
        (``StepDecay``) raise at the next call of a model whose schedule is not known.
        """
        self._timeline.auto(noise)

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
        """The scale w of classifier-free guidance that takes what calls return: guidance by perturbed attention then
        changes the rows that are "cond" alone, by its own scale over w, so that u + w (c - u) + s (c - p) results.
        ``None``, the default: nothing takes it, or what does has all :attr:`rows` in one call, and those that are not
        "cond" get the same change."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float | None) -> None:
        if scale is not None and not 0 < number(scale) < math.inf:
            raise SlothError(f"guidance_scale={scale!r}: that of classifier-free guidance, above 0, or None for none")
        self._guidance_scale = None if scale is None else number(scale)
        self._apply()

    @property
    def prediction(self) -> Prediction | None:
        """What the model predicts, for SAG: "epsilon", "v_prediction", "sample", "flow" or "edm", or a
        :class:`sloth_fx.prediction.Prediction`. ``None``, the default: nobody told."""
        return self._timeline.prediction

    @prediction.setter
    def prediction(self, given: Any) -> None:
        self._timeline.prediction = given if given is None or isinstance(given, Prediction) else Prediction(given)
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
        self._conditioning.set_negative(arguments, self._calls.arguments)

    @property
    def branched(self) -> bool:
        """Whether a model that is guided runs in two branches."""
        return any(plan.branching is not None for plan in self._steering.plans)

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
        return self._timeline.moment

    @property
    def progress(self) -> float:
        """0 at the start of sampling, 1 at its end."""
        return self._timeline.moment.progress

    @property
    def sigma(self) -> float | None:
        """The noise level; ``None`` where neither the caller nor the model's schedule tells."""
        return self._timeline.moment.sigma

    @property
    def phase(self) -> int:
        """Number of the present set of strides and tiles: with ``phases=K`` the K-th of the run the moment lies in,
        else in order of first appearance. Each is one compiled graph."""
        if self._steering.phases is not None:
            return self._steering.phases.number(self.moment)
        return self._steering.number_of(self.layouts()) if self._calls.latent is not None else 0

    @property
    def driven(self) -> bool:
        """Whether the caller says where the run is; otherwise each call's own timestep does."""
        return self._timeline.driven

    def layouts(self) -> Layouts:
        """The layout of every patched site now, in order of execution. Raises before the size of a latent is known."""
        return self._layouts(self.moment)

    def moments(self, steps: int | None = None) -> list[Moment]:
        """One moment for each distinct set of strides and tiles that a run of ``steps`` steps goes through.

        Default: a run through all 1000 timesteps; with ``phases=K``, all K. Their number is the number of graphs that
        ``torch.compile`` makes of the model. Needs the size of the latent, like :meth:`layouts`.
        """
        distinct: dict[Layouts, Moment] = {}
        for moment in self._run(steps):
            distinct.setdefault(self._layouts(moment), moment)
        return list(distinct.values())

    def sigma_at(self, progress: float) -> float | None:
        """The noise level at ``progress`` by the model's own schedule; ``None`` where that is not known."""
        return self._timeline.moment_at(progress).sigma

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Whatever happens inside, the context is afterwards where it was."""
        timeline = self._timeline
        state = timeline.driven, timeline.steps, timeline.sigma_given, timeline.moment
        try:
            yield
        finally:
            timeline.driven, timeline.steps, timeline.sigma_given, timeline.moment = state
            self._apply()

    # How it acts

    def guided_by(self, guide: Guide) -> None:
        """Let ``guide`` bring the negative text into the model."""
        self._conditioning.guide = guide

    def attach(self, plan: SitePlan, operators: list[Operator]) -> None:
        """Take charge of the ``operators`` of one site."""
        self._steering.attach(plan, operators)

    def located_with(
        self, model: nn.Module, adapter: ModelAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remember what the call looked like from which the sites are known, and how to read others."""
        self._timeline.adapter = adapter
        self._calls.located_with(model, adapter, args, kwargs)

    def try_layouts(self, plans: Iterable[SitePlan], latent: LatentSize) -> None:
        """Compute the layouts that ``plans`` would have now, for the errors that this may raise."""
        if not any("sigma" in clocks([plan]) for plan in plans) or self.sigma is not None:
            for plan in plans:
                plan.layout(self.moment, latent)

    def resize(self, latent: Sequence[int]) -> None:
        """The latent has (rows, columns) or (frames, rows, columns) ``latent``; packed latents count tokens.

        Each call of the model says so by itself, if its arguments do; this serves models whose arguments don't.
        """
        self._calls.resize(latent)
        self._apply()

    def ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operators are set for a call with these arguments; it can be asked within a graph."""
        if self._calls.latent is None or not (self.driven or not self._steering.clocks):
            return False
        if self._guides or self._steering.predicts:
            return False  # whether the negative text is at hand cannot be told within a graph
        return self._calls.same_size(args, kwargs)

    def observe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool) -> None:
        """Before each call of ``model``: read the latent's size and, unless driven, the timestep.

        ``compiled`` tells that this call comes from a compiled module.
        """
        self._calls.read_size(args, kwargs)
        self._read_moment(args, kwargs)
        self._steering.check(self.moment)
        self._apply()
        if self._guides:
            self._conditioning.bring_negative(model, (args, kwargs), self._calls.arguments)
        state = (self._timeline.steps, self._calls.latent, len(self._steering.sets))
        self._recompiles.check(model, compiled, state, self._sets)

    @property
    def _guides(self) -> bool:
        here = self._conditioning.guide is not None and any(self._conditioning.rows)
        return here and any(layout.guided for layout in self._steering.current)

    def _read_moment(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timeline, steering = self._timeline, self._steering
        if timeline.driven:
            if steering.predicts and not timeline.sigma_given:  # x0 needs that of this very call
                timeline.read_sigma(self._calls.timestep(args, kwargs))
        elif steering.clocks or steering.predicts:
            timeline.follow(self._calls.timestep(args, kwargs))
        elif any(plan.draws for plan in steering.plans):
            with suppress(SlothError):  # other choices at each step are better, and not needed
                timeline.follow(self._calls.timestep(args, kwargs))

    def _drive(self, moment: Moment, *, steps: int | None = None, sigma_given: bool = False) -> None:
        self._steering.check(moment)
        self._timeline.drive(moment, steps=steps, sigma_given=sigma_given)
        self._apply()

    def _apply(self) -> None:
        latent = self._calls.latent
        if latent is None or self._steering.lacks_sigma(self.moment):
            return  # the next call of the model brings the one, and raises for want of the other
        halves, rows = self._conditioning.groups, self._conditioning.rows
        self._steering.set(Setting(self.moment, latent, halves, rows, self._guidance_scale, self.prediction))

    def _layouts(self, moment: Moment) -> Layouts:
        if self._calls.latent is None:
            raise SlothError("the size of the latent is not known yet: run the patched model once")
        return self._steering.layouts(moment, self._calls.latent)

    def _run(self, steps: int | None) -> list[Moment]:
        phases = self._steering.phases
        if steps is None and phases is not None:
            return [phases.middle(phase) for phase in range(phases.count)]
        return self._timeline.run(steps)

    def _sets(self) -> Iterable[Layouts]:
        """Those that this run goes through, or that there were where its steps are not known."""
        steps = self._timeline.steps
        return self._steering.sets if steps is None else map(self._layouts, self._run(steps))
