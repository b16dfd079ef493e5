"""A decode step, compiled once."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConversionError
from qat_plugin.inference.attention import use_attention
from qat_plugin.inference.graph import OneProductPerInput
from qat_plugin.native import vectorized

_NUMBERS = itertools.count()
# Of generate(): a caller who gives one of these has chosen a cache.
_CHOOSES_A_CACHE = ("past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")
Model = TypeVar("Model", bound=nn.Module)


def compile_for_inference(model: Model) -> Model:
    """Compile a model for inference, in place.

    A causal language model of transformers keeps its ``generate``: where the caller chooses no cache it takes a static
    one, and each step that feeds one token runs compiled. Loops of your own get the same by passing a
    ``transformers.StaticCache``. The first such step takes some ten seconds; a cache of another length or another batch
    size compiles once more, and for any length or size after that.

    New weights may be loaded into the model, it may change its type, device or adapters, and be copied. What the
    compiled step does not see is a module put in another's place: call this afterwards. Without a compiler the model is
    left as it is, with a warning.

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
    whole: Any = model
    inner: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # peft calls the inner one
    if not hasattr(inner, "generation_config"):
        model.compile()
    elif not isinstance(inner.__dict__.get("forward"), _DecodeStep):
        use_attention(inner)
        inner.generate = _Generate(inner)
        inner.forward = _DecodeStep(inner)
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


class _Method:
    """Stands for a method of one model; a copy of the model has its own."""

    name: str

    def __init__(self, model: Any) -> None:
        self.model = model
        self.original: Callable[..., Any] = getattr(model, self.name)
        # with the signature that generate() reads
        functools.update_wrapper(cast("Callable[..., Any]", self), self.original)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        copied = memo[id(self.model)]
        copied.__dict__.pop(self.name, None)
        return type(self)(copied)


class _Generate(_Method):
    """``generate`` on a static cache, unless the caller chooses another or the model takes none."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.model.generation_config
        chosen = any(kwargs.get(name) is not None for name in _CHOOSES_A_CACHE) or config.cache_implementation
        fits = not self.model.config.is_encoder_decoder and getattr(self.model, "_can_compile_fullgraph", False)
        if fits and not chosen and kwargs.get("use_cache", config.use_cache) is not False:
            kwargs = {"cache_implementation": "static", "disable_compile": True, **kwargs}  # it is compiled here
        return self.original(*args, **kwargs)


class _DecodeStep(_Method):
    """A forward pass that is compiled where it adds one token to a cache of fixed size."""

    name = "forward"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.names = tuple(inspect.signature(self.original).parameters)
        self.compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if not _adds_one_token(named):
            return self.original(*args, **kwargs)
        first = next(self.model.parameters())
        key = (first.dtype, first.device, self.model.training)  # guards on tensors are left out
        if key not in self.compiled:
            options: dict[str, Any] = {"guard_filter_fn": _guards_on_state, **_graph_pass()}
            self.compiled[key] = torch.compile(_with_code_of_its_own(self.original), fullgraph=True, options=options)
        try:
            return self.compiled[key](*args, **kwargs)
        except torch._dynamo.exc.Unsupported:  # found before anything ran: not one graph, and so with all its guards
            self.compiled[key] = torch.compile(_with_code_of_its_own(self.original), options=_graph_pass())
            return self.compiled[key](*args, **kwargs)


def _graph_pass() -> dict[str, Any]:
    return {"post_grad_custom_post_pass": OneProductPerInput()} if vectorized() else {}


def _guards_on_state(guards: Sequence[Any]) -> list[bool]:
    """Which guards to ask before each token: not whether every module and parameter is still the one it was, which
    takes longer than a layer; but the numbers, names and lists that modules keep (which adapter is active, how far
    rotary tables reach).
    """
    kept = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    state = (bool, int, float, str, list, tuple, type(None))
    return [
        keep or (guard.has_value and isinstance(guard.value, state)) for keep, guard in zip(kept, guards, strict=True)
    ]


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
