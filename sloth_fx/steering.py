"""How the operators of a model are set for a moment: each by the layout that its plan has then."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

from sloth_fx.branching import Groups
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout
from sloth_fx.phases import Phases
from sloth_fx.plan import SitePlan, clocks
from sloth_fx.prediction import Prediction
from sloth_fx.schedule import Moment
from sloth_fx.site import LatentSize

Layouts = tuple[KeyLayout, ...]


class Operator(Protocol):
    """What the context steers: a module that acts according to a layout."""

    layout: KeyLayout

    def set_layout(self, layout: KeyLayout, halves: int) -> None: ...


class Setting(NamedTuple):
    """All that operators are told of a call; ``halves`` and ``rows`` are the groups of its batch."""

    moment: Moment
    latent: LatentSize
    halves: int
    rows: Groups
    guidance_scale: float | None
    prediction: Prediction | None


class Steering:
    """The ``plans`` of all sites of a model, and the operators that act there.

    ``current`` are the layouts that these have now, and ``sets`` numbers all sets of layouts that there were.
    """

    def __init__(self, phases: int | None) -> None:
        self.phases = Phases(phases, by_sigma=False) if phases is not None else None
        self.plans: tuple[SitePlan, ...] = ()
        self.clocks: frozenset[str] = frozenset()
        self.current: Layouts = ()
        self.sets: dict[Layouts, int] = {}
        self._operators: tuple[list[Operator], ...] = ()
        self._applied: Setting | None = None

    # Nothing is changed in place: a copy made before a transform that fails is as it was.

    def attach(self, plan: SitePlan, operators: list[Operator]) -> None:
        """Take charge of the ``operators`` of one site."""
        self.plans = (*self.plans, plan)
        self._operators = (*self._operators, operators)
        self.clocks |= clocks([plan])
        if self.phases is not None:
            self.phases = replace(self.phases, by_sigma="sigma" in self.clocks)
            _check_acts(plan, self.phases)

    @property
    def predicts(self) -> bool:
        """Whether something here needs to know what the model predicts."""
        return any(hasattr(operator, "set_prediction") for operators in self._operators for operator in operators)

    def lacks_sigma(self, moment: Moment) -> bool:
        """Whether something here needs a noise level that ``moment`` does not have."""
        return "sigma" in self.clocks and moment.sigma is None

    def check(self, moment: Moment) -> None:
        """Raise :class:`SlothError` for a moment at which no layout is known."""
        if self.lacks_sigma(moment):
            raise SlothError(
                "a spec here needs sigma, and the noise schedule of this model is not known: give it with "
                "at(progress, sigma=...) or auto(NoiseSchedule(...))"
            )

    def layouts(self, moment: Moment, latent: LatentSize) -> Layouts:
        """The layout of every site at ``moment``, or in the middle of its phase."""
        if self.phases is not None:
            moment = self.phases.middle(self.phases.number(moment))
        return tuple(plan.layout(moment, latent) for plan in self.plans)

    def number_of(self, layouts: Layouts) -> int:
        """Which of all sets this is, in order of first appearance."""
        if layouts not in self.sets:
            self.sets = {**self.sets, layouts: len(self.sets)}
        return self.sets[layouts]

    def set(self, setting: Setting) -> None:
        """Set every operator."""
        changed = setting != self._applied
        if changed:
            self.current = self.layouts(setting.moment, setting.latent)
            self.number_of(self.current)
            self._applied = setting
        for plan, layout, operators in zip(self.plans, self.current, self._operators, strict=True):
            for operator in operators:
                if changed or operator.layout is not layout:  # torch.export puts attributes of modules back
                    operator.set_layout(layout, setting.halves)
                if changed:
                    _tell(operator, plan, setting)


def _check_acts(plan: SitePlan, phases: Phases) -> None:
    """Raise :class:`SlothError` for guidance that acts in a part of the run which is the middle of no phase."""
    middles = [phases.middle(number) for number in range(phases.count)]
    for spec in (plan.guiding, plan.perturbing):
        if spec is None or any(spec.acts(moment) for moment in middles):
            continue
        if any(spec.acts(moment._replace(progress=progress / 1000)) for moment in middles for progress in range(1001)):
            raise SlothError(
                f"{type(spec).__name__} acts from start={spec.start} to stop={spec.stop}, and the middle of none of "
                f"phases={phases.count} lies there: it would never act; take more phases, or leave phases out"
            )


def _tell(operator: Operator, plan: SitePlan, setting: Setting) -> None:
    """Let an operator know what else it asks for."""
    if hasattr(operator, "set_rows"):
        operator.set_rows(setting.rows)
    if plan.draws and hasattr(operator, "set_seed"):
        operator.set_seed(plan.seed(setting.moment))
    if hasattr(operator, "set_prediction"):
        operator.set_prediction(setting.prediction)
    if hasattr(operator, "set_moment"):
        operator.set_moment(setting.moment, setting.guidance_scale)
