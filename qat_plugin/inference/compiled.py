"""A decode step, compiled once."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConversionError
from qat_plugin.inference.attention import use_attention
from qat_plugin.inference.graph import OneProductPerInput
from qat_plugin.native import available

_NUMBERS = itertools.count()
Model = TypeVar("Model", bound=nn.Module)


def compile_for_inference(model: Model) -> Model:
    """Compile a model for inference, in place.

    A causal language model of transformers keeps its ``generate``: it uses a static cache now, and each step that feeds
    one token runs compiled. Loops of your own get the same by passing a ``transformers.StaticCache``. The first such
    step takes some ten seconds; a cache of another length or another batch size compiles once more, and for any length
    or size after that.

    The compiled step does not look whether modules or parameters were exchanged since: load, convert and move the model
    before. Without a compiler the model is left as it is, with a warning.

    Args:
        model: in evaluation mode; converted or not.

    Returns:
        ``model``.

    Raises:
        ConversionError: for a model in training mode.

    Example::

        model = compile_for_inference(convert(model, "w4a16-g32"))
        model.generate(ids, max_new_tokens=100)
    """
    if model.training:
        raise ConversionError(f"{type(model).__name__} is in training mode; call .eval() before compile_for_inference")
    if reason := _no_compiler():
        warnings.warn(f"{type(model).__name__} is not compiled: {reason}", stacklevel=2)
        return model
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:
        model.compile()
        return model
    if "_qat_decode" not in model.__dict__:
        use_attention(model)
        step = _DecodeStep(model.forward)
        model.__dict__["_qat_decode"] = step
        model.forward = step.as_method()
        generation.cache_implementation = "static"
        generation.disable_compile = True  # generate() would compile the step a second time
    return model


def _no_compiler() -> str:
    """Why torch.compile cannot run on this machine, or ""."""
    from torch._inductor import exc

    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        return f"torch.compile needs a C++ compiler ({error})"
    return ""


class _DecodeStep:
    """A forward pass that is compiled where it adds one token to a cache of fixed size."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.eager = forward
        self.names = tuple(inspect.signature(forward).parameters)
        # The modules of a finished model do not change; asking each of them before each token costs more than a layer.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if available():
            options["post_grad_custom_post_pass"] = OneProductPerInput()
        self.compiled = torch.compile(_with_code_of_its_own(forward), options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return (self.compiled if _adds_one_token(named) else self.eager)(*args, **kwargs)

    def as_method(self) -> Callable[..., Any]:
        """With the signature that ``generate`` reads."""

        @functools.wraps(self.eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return forward


def _with_code_of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function around ``forward``: what is compiled is kept by code object, and models of one class share theirs."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    code = step.__code__.replace(co_name=f"decode_step_{next(_NUMBERS)}")
    return types.FunctionType(code, step.__globals__, code.co_name, closure=step.__closure__)


def _adds_one_token(named: dict[str, Any]) -> bool:
    ids, cache = named.get("input_ids"), named.get("past_key_values")
    if ids is None:
        ids = named.get("inputs_embeds")
    if not isinstance(ids, Tensor) or ids.shape[1] != 1 or cache is None or torch.is_grad_enabled():
        return False
    return bool(getattr(cache, "is_compileable", False)) and not torch.compiler.is_compiling()
