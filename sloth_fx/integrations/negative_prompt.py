"""What an attached pipeline encodes: its prompt, which tells the rows of a batch apart, and a negative one like it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sloth_fx.errors import SlothError

_OF_THE_PROMPT = ("prompt", "negative", "pooled")
"""Parameters of encode_prompt whose names begin with one of these say what the prompt is; others, how to encode it."""


_BY_HAND = "attach without negative_prompt, and give its embeddings with set_negative of the handle's context"


class PromptEncoder:
    """Sees what the pipeline encodes, and encodes the negative prompt, if there is one, in the same way.

    What a denoiser is given for the prompt is among the results of the pipeline's ``encode_prompt``. Where it is found
    there, the result for the negative prompt goes in its place; so nothing has to be known of the pipeline.
    """

    def __init__(self, pipe: Any, prompt: str | Sequence[str] | None) -> None:
        kind = type(pipe).__name__
        self._encode: Callable[..., Any] | None = getattr(pipe, "encode_prompt", None)
        if self._encode is None or "prompt" not in inspect.signature(self._encode).parameters:
            raise SlothError(
                f"{kind} has no encode_prompt(prompt): attach without negative_prompt, and give its embeddings with "
                "set_negative of the handle's context"
            )
        self._pipe = weakref.ref(pipe)
        self._prompts = None if prompt is None else checked(prompt)
        self._encoded: list[_Encoded] = []
        self._used = False
        self.runs = 0
        """How often a prompt was encoded."""
        self._before = vars(pipe).get("encode_prompt")  # somebody else's, on this pipeline alone
        pipe.encode_prompt = self.encode_prompt

    @property
    def negates(self) -> bool:
        """Whether there is a negative prompt."""
        return self._prompts is not None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The negative prompt: one for all images, or one for each."""
        return tuple(self._prompts or ())

    @prompts.setter
    def prompts(self, prompt: str | Sequence[str]) -> None:
        self._prompts = checked(prompt)

    def stop(self) -> None:
        """Give the pipeline its own ``encode_prompt`` back."""
        pipe = self._pipe()
        if pipe is not None and pipe.__dict__.get("encode_prompt") == self.encode_prompt:
            del pipe.encode_prompt
            if self._before is not None:
                pipe.encode_prompt = self._before

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own gives; what it gives for the negative prompt is kept."""
        assert self._encode is not None
        found = self._encode(*args, **kwargs)
        self._keep(found, None if self._prompts is None else self._encode_negative(self._prompts, args, kwargs))
        return found

    def _encode_negative(self, prompts: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._encode is not None
        given = inspect.signature(self._encode).bind(*args, **kwargs)
        asked = given.arguments.get("prompt")
        count = len(asked) if isinstance(asked, (list, tuple)) else 1
        for name in given.arguments:
            if name.startswith(_OF_THE_PROMPT):
                given.arguments[name] = None
        given.arguments["prompt"] = prompts
        parameters = given.signature.parameters
        if "do_classifier_free_guidance" in parameters:
            given.arguments["do_classifier_free_guidance"] = False
        for name in ("num_images_per_prompt", "num_videos_per_prompt"):
            if name in given.arguments and len(prompts) != count:
                given.arguments[name] = 1
        return self._encode(*given.args, **given.kwargs)

    def _keep(self, found: Any, negative: Any) -> None:
        if self._used:
            self._encoded, self._used = [], False
        ones, others = (list(_tensors(each)) for each in (found, negative))
        self._encoded += [
            _Encoded(one, others[index] if index < len(others) else None, index == 0)
            for index, one in enumerate(ones)
            if one is not None
        ]
        self.runs += 1

    def read(self, tensors: Mapping[str, Tensor], groups: int, batch: int) -> tuple[dict[str, Tensor], int | None]:
        """The negative text by the labels of the ``tensors`` of a call whose ``batch`` has so many ``groups``, and the
        number of that group which is the prompt's; ``None`` if the call is for another text that was encoded.

        Raises :class:`SlothError` where what was encoded is not among the ``tensors``.
        """
        self._used = True
        parts = [
            (label, group, part)
            for label, tensor in tensors.items()
            if tensor.ndim > 0 and tensor.shape[0] == batch
            for group, part in enumerate(tensor.chunk(groups))
        ]
        matches = [
            (each, label, group) for each in self._encoded for label, group, part in parts if each.is_given(part)
        ]
        if not matches:
            raise SlothError(
                f"none of the arguments of this call ({', '.join(tensors)}) is what encode_prompt has given: "
                + ("say what its rows are with rows of the handle's context" if self._prompts is None else _BY_HAND)
            )
        place = next((group for each, _, group in matches if each.leads), None)
        found: dict[str, Tensor] = {}
        for each, label, group in matches:
            if group == place and each.negative is not None:
                found.setdefault(label, each.negative)
        return found, place


def checked(prompt: Any) -> list[str]:
    """A negative prompt as a list. Raises :class:`SlothError` for what is none."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise SlothError(f"negative_prompt={prompt!r:.80}: a string, or a list with one for each prompt")
    return list(texts)


class _Encoded(NamedTuple):
    """A tensor that was encoded, and its like for the negative prompt. The first of them ``leads``: it is the text."""

    positive: Tensor
    negative: Tensor | None
    leads: bool

    def is_given(self, part: Tensor) -> bool:
        one = self.positive
        return one.shape == part.shape and torch.equal(one.to(part.device, part.dtype), part)


def _tensors(result: Any) -> Iterator[Tensor | None]:
    """The tensors of a result in order, ``None`` for what is none."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (list, tuple)):
        for each in result:
            yield from _tensors(each)
    else:
        yield result if isinstance(result, Tensor) else None
