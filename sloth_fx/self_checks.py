"""What must hold of any guidance, tried on the model's own weights: a model that is guided wrongly says so at once.

A negative text that is the text itself, or a share of 0, gives what the model gives without guidance; and of another
text the guided attentions read something else. One call for both branches of a perturbed model gives what two give.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves

from sloth_fx.branches import NAME, Branches
from sloth_fx.capture.call import substitute
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Rehearsal, with_data
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.layouts import set_layouts
from sloth_fx.negative import Negative
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.one_image import GuidedResult
from sloth_fx.perturbed import Perturbed, share

_PLAIN = NAG(scale=2.0, tau=math.inf, alpha=1.0)  # any wrong number shows, and rounding is not blown up
_NOTHING = NAG(scale=2.0, tau=math.inf, alpha=0.0)
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the norm of the result; half precision: a tenth
_ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6}  # of the norm of the result; half precision: its last place
_DEAREST = {"cpu": 1e12}  # weights times tokens: some ten seconds for a call
_DEAREST_ELSEWHERE = 1e15


def why_not_checked(model: nn.Module, call: Call, tokens: int) -> str | None:
    """Why guidance of ``model`` cannot be tried on a ``call`` with so many ``tokens``: no data, or too much."""
    tensors = [*model.parameters(), *model.buffers()]
    given = [each for each in tree_leaves(call) if isinstance(each, Tensor)]
    if any(each.is_meta for each in tensors) or any(map(is_fake, (*tensors, *given))):
        return "there is no data"
    if any("_hf_hook" in module.__dict__ for module in model.modules()):
        return "weights are offloaded"
    if len({each.device for each in tensors}) > 1:
        return "weights are on several devices"
    device = tensors[0].device.type if tensors else "cpu"
    weights = sum(each.numel() for each in model.parameters())
    if weights * tokens > _DEAREST.get(device, _DEAREST_ELSEWHERE):
        return "the example is large"
    return None


def check_guidance(model: nn.Module, call: Call) -> str | None:
    """Raise :class:`SlothError` unless guidance of ``model``, patched and with branches, does on a ``call`` what any
    guidance does; or say why that cannot be seen. Noise stands for what has no data in the call. It takes three to four
    times as long as the call; neither the model nor a random state changes."""
    trial = Rehearsal(model)
    trial.model.eval()
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    args, kwargs = with_data(call, device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), trial.running():
        return _check(trial.model, (args, kwargs))


def check_shared(model: nn.Module, call: Call) -> tuple[str | None, str | None]:
    """What is wrong with one ``call`` of a ``model``, patched and perturbed, for both branches: it has to change what
    two calls change; and why that cannot be seen. It takes some four times as long as the call; neither the model nor a
    random state changes."""
    try:
        plain, apart = (_perturbed(model, call, acts=acts) for acts in (False, True))
    except Exception as error:  # half precision on a CPU, or a table that noise cannot look up
        return None, f"it does not run here: {type(error).__name__}"
    if not all(each.isfinite().all() for each in (*plain, *apart)):
        return None, "what it gives is not finite"
    try:
        shared = _perturbed(model, call, shares=True)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip():.200}", None
    if len(shared) == len(apart) and all(map(_same_change, shared, apart, plain)):
        return None, None
    return "one for both gives something else", None


def _same_change(found: Tensor, expected: Tensor, plain: Tensor) -> bool:
    """Whether both are changed alike. The change may be small beside ``plain``, whose rounding is in either."""
    if found.shape != expected.shape:
        return False
    change, rest, size = (float(each.double().norm()) for each in (expected - plain, found - expected, plain))
    rounding = _ROUNDING.get(plain.dtype, torch.finfo(plain.dtype).eps)
    return rest <= _NEAR.get(plain.dtype, 0.1) * change + rounding * size


def _perturbed(model: nn.Module, call: Call, *, acts: bool = True, shares: bool = False) -> list[Tensor]:
    trial = Rehearsal(model)
    trial.model.eval()
    if shares:
        share(trial.model)
    perturbed = next(module for module in trial.model.modules() if isinstance(module, Perturbed))
    perturbed.scale = torch.ones((), dtype=torch.float64)
    set_layouts(trial.model, perturbed=acts)
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    args, kwargs = with_data(call, device)
    if len(perturbed.latent_of(args, kwargs)) % 2 == 0:
        for module in trial.model.modules():
            if hasattr(module, "rows") and isinstance(getattr(module, "layout", None), KeyLayout):
                module.__dict__["rows"] = (False, True)
        perturbed.halves = 2
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trial.running():
        return _floats(trial.model(*args, **kwargs))


def _check(model: nn.Module, call: Call) -> str | None:
    branches = model._modules[NAME]
    assert isinstance(branches, Branches)
    text = [id(each) for each in branches.arguments.text(*call).values()]
    given = branches.original.labelled(call)
    own = {name: each for name, each in given.items() if id(each) in text}

    set_layouts(model, guided=False)
    try:
        base = _floats(model(*call[0], **call[1]))
    except Exception as error:  # half precision on a CPU, say
        return f"unguided it does not run here: {type(error).__name__}"
    if not all(each.isfinite().all() for each in base):
        return "what it gives is not finite"

    set_layouts(model, guided=True)
    others = {name: _other(each) for name, each in own.items()}
    found, reads = _guided(model, call, others, _NOTHING)
    name = type(model).__name__
    if not _near(found, base):
        raise SlothError(f"{name}: with alpha=0, guidance changes what the model gives. {_ADVICE}")
    shown = {} if reads else _shown(given, own)
    if shown:
        _, reads = _guided(model, _replaced(branches, call, shown), others, _NOTHING)
    if not reads:
        raise SlothError(
            f"{name}: the guided attentions read the same of any text ({', '.join(own)}): nothing would be guided"
        )
    found, _ = _guided(model, call, {name: each.clone() for name, each in own.items()}, _PLAIN)
    if not _near(found, base):
        raise SlothError(f"{name}: a negative text that is the text itself changes what the model gives. {_ADVICE}")
    return None


def _shown(given: dict[str, Tensor], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """What may hide all of a text, because it has a zero for each token, with ones."""
    tokens = {size for each in text.values() for size in each.shape[1:-1] or each.shape[:1]}
    return {
        name: torch.ones_like(each)
        for name, each in given.items()
        if not each.is_floating_point() and tokens & set(each.shape[-1:]) and not each.any()
    }


def _replaced(branches: Branches, call: Call, tensors: dict[str, Tensor]) -> Call:
    names = iter(branches.original.labelled(call))
    args, kwargs = substitute(call, lambda each: tensors.get(next(names), each))
    return args, kwargs


_ADVICE = "The negative text would guide it wrongly, so it is refused"


def _guided(model: nn.Module, call: Call, text: dict[str, Tensor], spec: NAG) -> tuple[list[Tensor], bool]:
    """What the model gives, and whether its guided attentions read something else of the negative text."""
    seen = []

    def look(module: nn.Module, args: Any) -> None:
        assert isinstance(module, GuidedResult)
        pairs = module.image_in_branches(args[0])
        seen.append(any(not torch.equal(*pair) for pair in pairs))

    branches = model._modules[NAME]
    assert isinstance(branches, Branches)
    hooks = []
    for module in model.modules():
        if isinstance(module, GuidedResult) and module.guidance is not None:
            module.guidance = spec
            hooks.append(module.register_forward_pre_hook(look))
    branches.prepare(model, call, Negative({}, text), (True,))
    args, kwargs = call
    try:
        found = _floats(model(*args, **kwargs))
    except SlothError:
        raise
    except Exception as error:
        raise SlothError(
            f"with a negative text {type(model).__name__} does not run: {type(error).__name__}: "
            f"{str(error).strip():.200}"
        ) from error
    for hook in hooks:
        hook.remove()
    return found, any(seen)


def _other(text: Tensor) -> Tensor:
    """Something that no layer takes for the same, not even if all of the text is zero."""
    wave = torch.arange(text.shape[-1], device=text.device, dtype=torch.float32).sin()
    return text.flip(-1) + wave.to(text.dtype)


def _floats(result: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(result)) if isinstance(result, dict) else tree_leaves(result)
    return [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]


def _near(found: list[Tensor], base: list[Tensor]) -> bool:
    if len(found) != len(base) or any(one.shape != other.shape for one, other in zip(found, base, strict=True)):
        return False
    return all(
        float((one - other).double().norm()) <= _NEAR.get(other.dtype, 0.1) * float(other.double().norm()) + 1e-12
        for one, other in zip(found, base, strict=True)
    )
