"""Attention functions of hosts: known by name, never imported.

Hosts call attention through functions of their own: a dispatcher over backends, a fused kernel. Traced through, the
backend that the user chose would be baked in, and kernels fail on tensors without data. So such a function is a leaf.
The table says how each is called; :func:`intercept` hands its calls to whoever wants to see them, and on request
those of the few functions of torch that take no proxies.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sloth_fx.capture.host_call import LAYOUTS, HostCall, HostFunction
from sloth_fx.capture.torch_private import VMAP
from sloth_fx.errors import SlothError

__all__ = ["HostCall", "HostFunction", "entry_for", "intercept", "recognised", "register_attention_function"]

Function = Callable[..., Any]
Handler = Callable[[HostFunction, Function, tuple[Any, ...], dict[str, Any]], Any]
NativeHandler = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]

# Options of fused kernels with which no operator works, where they are given.
_REFUSED = {
    "window_size": "it attends within a window of tokens",
    "alibi_slopes": "it adds a bias by distance",
    "softcap": "it caps the scores",
    "return_attn_probs": "it returns more than the attention",
    "return_lse": "it returns more than the attention",
    "return_aux": "it returns more than the attention",
    "score_mod": "a function changes its scores",
    "block_mask": "its mask is made of blocks",
}
# Modules of torch whose globals are looked at, and functions of torch that hand their tensors to native code.
_OF_TORCH = frozenset({"torch.nn.attention.flex_attention", VMAP.module})
_NATIVE = frozenset({"create_block_mask", "create_mask", VMAP.name})
_TABLE: dict[str, list[HostFunction]] = {}
_recognised: weakref.WeakKeyDictionary[Any, HostFunction] = weakref.WeakKeyDictionary()


def register_attention_function(
    name: str,
    *,
    layout: str,
    parameters: Sequence[str] = ("query", "key", "value"),
    output_layout: str | None = None,
    layouts: Mapping[tuple[str, Any], str] | None = None,
    output_layouts: Mapping[tuple[str, Any], str] | None = None,
    mask: str | None = None,
    causal: str | None = None,
    heads: str | None = None,
    refused: Mapping[str, str] | None = None,
    inert: Sequence[str] = (),
) -> HostFunction:
    """Make a host's attention function known, so that models which call it can be transformed.

    ``name`` is that of a global in some module, ``parameters`` the names of its parameters by position (query, key and
    value first), ``layout`` one of ``BHND``, ``BNHD``, ``BNC`` (which needs ``heads``, the name of the parameter that
    counts them) and ``NHD`` (packed sequences: recognised, but no operator works on them). ``layouts`` and
    ``output_layouts`` tell where an option changes them: ``{("skip_reshape", True): "BHND"}``. ``mask`` and ``causal``
    name those parameters; a mask has to be one that ``F.scaled_dot_product_attention`` takes. ``refused`` maps options
    with which operators cannot work to the reason. ``inert`` are options that choose how attention is computed, and not
    what.

    Raises :class:`SlothError` for an unknown layout or too few parameters.
    """
    for each in (layout, output_layout or layout, *(layouts or {}).values(), *(output_layouts or {}).values()):
        if each not in LAYOUTS:
            raise SlothError(f"{name}: the layout {each!r} is none of {', '.join(LAYOUTS)}")
    if len(parameters) < 3:
        raise SlothError(f"{name}: parameters are {tuple(parameters)}; query, key and value come first")
    if "BNC" in (layout, *(layouts or {}).values()) and heads is None:
        raise SlothError(f"{name}: the layout BNC needs heads=, the name of the parameter that counts them")
    entry = HostFunction(
        name,
        layout,
        tuple(parameters),
        output_layout,
        layouts or {},
        output_layouts or {},
        mask,
        causal,
        heads,
        {**_REFUSED, **(refused or {})},
        tuple(inert),
    )
    known = _TABLE.setdefault(name, [])
    known[:] = [entry, *(each for each in known if each.parameters != entry.parameters)]
    return entry


def entry_for(name: str, function: Any) -> HostFunction | None:
    """The entry of the table that ``function``, called ``name`` by its host, is."""
    return next((entry for entry in _TABLE.get(name, ()) if entry.fits(function)), None)


def recognised(function: Any) -> HostFunction | None:
    """The entry of a function that :func:`intercept` has found by its name: an alias may be called otherwise."""
    try:
        return _recognised.get(function)
    except TypeError:  # neither hashable nor weakly referenced: no function
        return None


# Calls are handed on per thread: a model that runs in another one meanwhile meets nothing but one more function call.

_lock = threading.Lock()
_thread = threading.local()
_installed: list[tuple[dict[str, Any], str, Function, Function]] = []  # where, name, original, stand-in
_users = 0


@contextmanager
def intercept(handler: Handler, native: NativeHandler | None = None) -> Iterator[None]:
    """Within, a call of a function in the table calls ``handler(entry, function, args, kwargs)`` instead.

    ``native(function, args, kwargs)`` is called instead of functions of torch that make masks or vectorise others.

    That is so on this thread alone. Whatever the handler returns is what the host gets; what the handler itself calls
    is not intercepted. Functions are found as globals of loaded modules. Contexts nest: the innermost handler counts.
    """
    outer = getattr(_thread, "handlers", None)
    _install()
    _thread.handlers = handler, native
    try:
        yield
    finally:
        _thread.handlers = outer
        _uninstall()


@contextmanager
def not_intercepting() -> Iterator[None]:
    """Within, functions in the table are themselves on this thread."""
    outer = getattr(_thread, "handlers", None)
    _thread.handlers = None
    try:
        yield
    finally:
        _thread.handlers = outer


def _install() -> None:
    global _users
    with _lock:
        _users += 1
        stand_ins = {id(original): stand_in for _, _, original, stand_in in _installed}
        for module in list(sys.modules.values()):
            for namespace, name, function in _known_globals(module):
                entry = entry_for(name, function)
                if entry is not None or _is_native(name, function):
                    stand_in = stand_ins.setdefault(id(function), _stand_in(entry, function))
                    _installed.append((namespace, name, function, stand_in))
                    namespace[name] = stand_in


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        for namespace, name, original, stand_in in _installed:
            if namespace.get(name) is stand_in:  # else somebody has set another one meanwhile
                namespace[name] = original
        _installed.clear()


def _known_globals(module: Any) -> Iterator[tuple[dict[str, Any], str, Function]]:
    """The globals of ``module`` that have names of functions that may have to be leaves."""
    if not isinstance(module, ModuleType):
        return
    namespace = vars(module)
    path = str(namespace.get("__name__", ""))
    if path.startswith("torch.") and path not in _OF_TORCH:
        return
    for name in (*_TABLE, *_NATIVE):
        function = namespace.get(name)
        if function is not None and not hasattr(function, "sloth_fx_stands_in"):
            yield namespace, name, function


def _is_native(name: str, function: Any) -> bool:
    return name in _NATIVE and str(getattr(function, "__module__", "")).startswith("torch.")


def _stand_in(entry: HostFunction | None, function: Function) -> Function:
    if entry is not None:
        _recognised[function] = entry

    @functools.wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        handlers = getattr(_thread, "handlers", None)
        if handlers is None or (entry is None and handlers[1] is None):
            return function(*args, **kwargs)
        handler, native = handlers
        with not_intercepting():
            return native(function, args, kwargs) if entry is None else handler(entry, function, args, kwargs)

    stand_in.sloth_fx_stands_in = True  # type: ignore[attr-defined]
    return stand_in


# The table.

_KERNEL = ("q", "k", "v", "dropout_p", "softmax_scale", "causal")
_PACKED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_COMFY = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

register_attention_function(  # diffusers
    "dispatch_attention_fn",
    layout="BNHD",
    parameters=("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    mask="attn_mask",
    causal="is_causal",
    refused={"parallel_config": "its tokens are spread over several devices"},
)
register_attention_function(  # torch
    "flex_attention",
    layout="BHND",
    parameters=("query", "key", "value", "score_mod", "block_mask", "scale", "enable_gqa"),
)
register_attention_function(  # xformers; also (B x H, N, D)
    "memory_efficient_attention",
    layout="BNHD",
    parameters=("query", "key", "value", "attn_bias", "p", "scale"),
    mask="attn_bias",
)
register_attention_function("flash_attn_func", layout="BNHD", parameters=_KERNEL, causal="causal")
register_attention_function("flash_attn_varlen_func", layout="NHD", parameters=_PACKED, causal="causal")
register_attention_function("sageattn_varlen", layout="NHD", parameters=_PACKED, causal="is_causal")
for _name in (
    "sageattn",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
):
    register_attention_function(
        _name,
        layout="BHND",
        parameters=("q", "k", "v", "tensor_layout", "is_causal", "sm_scale"),
        layouts={("tensor_layout", "NHD"): "BNHD"},
        mask="attn_mask",
        causal="is_causal",
    )
for _name, _tensors in itertools.product(  # ComfyUI
    (
        "optimized_attention",
        "optimized_attention_masked",
        "attention_basic",
        "attention_flash",
        "attention_pytorch",
        "attention_sage",
        "attention_split",
        "attention_sub_quad",
        "attention_xformers",
    ),
    (("query", "key", "value"), ("q", "k", "v")),  # the former: attention_sub_quad, under whichever name
):
    register_attention_function(
        _name,
        layout="BNC",
        parameters=(*_tensors, *_COMFY),
        output_layout="BNC",
        layouts={("skip_reshape", True): "BHND"},
        output_layouts={("skip_output_reshape", True): "BHND"},
        mask="mask",
        heads="heads",
        inert=("attn_precision", "transformer_options"),
    )
