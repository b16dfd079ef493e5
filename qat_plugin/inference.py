"""``compile_for_inference(model)``: token by token, what is slow is no longer the weights but all that is around them.

A decode step of a causal language model is compiled once, on a cache of fixed size, and its attention to that cache is
one operator. Prompts of any length run as before. Any other module is compiled as a whole.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qat_plugin.errors import ConversionError
from qat_plugin.native import available

ATTENTION = "qat_plugin"
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
        _use_attention(model)
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
        guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.compiled = torch.compile(_with_code_of_its_own(forward), options=cast("dict[str, Any]", guards))

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


def _use_attention(model: nn.Module) -> None:
    """Let one new token attend by the native operator, where torch's own attention would."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not available():
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: the native operator for one query, torch's attention for more.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key, value: [batch, groups, positions, width]; heads read them in turn.
        attention_mask: bool [batch, 1, queries, positions], true where a key is seen; or ``None`` for all.
        dropout: probability, in training.
        scaling: of the products; by default ``width ** -0.5``.

    Returns:
        [batch, queries, heads, width], and no weights.
    """
    one = query.shape[2] == 1 and query.device.type == "cpu" and not torch.is_grad_enabled()
    plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    unusual = options.get("softcap") is not None or options.get("position_bias") is not None or options.get("cache")
    if one and plain and not unusual and query.dtype == key.dtype:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.qat_plugin_native.attend(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return result
