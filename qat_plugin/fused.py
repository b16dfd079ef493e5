"""Fake quantization in few passes over memory, equal to :mod:`qat_plugin.numerics` bit for bit.

Three forms; :func:`implementation` says which one a device runs:

* ``native``, on CPU: C++ operators, one pass forward; backward, one bit a weight says where the grid clipped, and
  nothing is kept where it did not.
* ``compiled``, on CUDA: the plain functions under ``torch.compile``, used only after they gave the plain form's bits on
  a sample there. It was checked on CPU; nobody has run it on a GPU yet.
* ``plain``: numerics as it is, for everything else: other devices and types, tensor subclasses, empty tensors.

Inside a user's own ``torch.compile`` the native operators stay operators, and what would be ``compiled`` is plain code
that the user's compilation takes in. The only bits that may differ are the payloads of NaN.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

import qat_plugin.learned as learned
import qat_plugin.numerics as numerics
from qat_plugin.native import available, native
from qat_plugin.scheme import Scheme

Form = Literal["native", "compiled", "plain"]
_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_CLASSES: Final = (Tensor, nn.Parameter)
_WHERE_CLIPPED: Final = 2  # the native mask: empty when nothing was clipped
# the division of eager PyTorch instead of an approximate one, and each rounding where eager PyTorch rounds
_EXACT: Final = ("emulate_precision_casts", "eager_numerics.division_rounding", "eager_numerics.disable_ftz")

_asked: Form | None = None
_native_runs = False  # as found when nothing was being traced


class Implementation(NamedTuple):
    """The form of fake quantization that runs on a device, and why."""

    name: Form
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def implementation(device: torch.device | str) -> Implementation:
    """Which form runs on a device; on CPU, the first call builds the native operators."""
    global _native_runs
    kind = torch.device(device).type
    _native_runs = kind == "cpu" and available()
    if _asked is not None:
        return Implementation(_asked, "it was asked for")
    if kind == "cpu" and _native_runs:
        return Implementation("native", str(native()))
    if kind == "cpu":
        return Implementation("plain", native().reason or "the native operators are disabled")
    if kind == "cuda":
        return Implementation("compiled", "torch.compile; plain where that fails or gives other bits, with a warning")
    return Implementation("plain", f"there is no faster form for {kind}")


@contextlib.contextmanager
def using(form: Form) -> Iterator[None]:
    """Inside, this form runs wherever it can: to compare, or ``compiled`` on a CPU without native operators."""
    global _asked
    before, _asked = _asked, form
    try:
        yield
    finally:
        _asked = before


def fake_quantize(
    weight: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """As :func:`qat_plugin.numerics.fake_quantize`."""
    form = _form(weight)
    if form == "native":
        return _native_weight(weight, scheme, scale, zero_point)[0]
    if form == "compiled" and not torch.compiler.is_compiling():
        return straight_through(weight, *quantized(weight, scheme, scale, zero_point))
    return numerics.fake_quantize(weight, scheme, scale, zero_point)


def fake_quantize_learned(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """As :func:`qat_plugin.learned.fake_quantize_learned`: the numbers to the bit, gradients up to float32 sums."""
    if _form(weight) == "plain" or torch.compiler.is_compiling():
        return learned.fake_quantize_learned(weight, scale, zero_point, scheme)
    return cast(Tensor, _Learned.apply(weight, scale, zero_point, scheme))


def fake_quantize_activation(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """As :func:`qat_plugin.numerics.fake_quantize_activation`."""
    form = _form(x)
    if form == "native" and (scale is None or scale.numel() == 1):
        out: Tensor = torch.ops.qat_plugin_native.fake_quantize_activation(x, scale, 0)[0]
        return out
    if form == "compiled" and not torch.compiler.is_compiling():
        with torch.no_grad():
            numbers, inside = _checked(_Key(x.device, x.dtype, None, scale is not None))(
                x.reshape(-1, x.shape[-1]), scale
            )
        return straight_through(x, numbers.reshape(x.shape), None if inside is None else inside.reshape(x.shape))
    return numerics.fake_quantize_activation(x, scale)


@torch.no_grad()
def quantized(
    weight: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The two halves of :func:`fake_quantize`: its numbers, and the mask that :func:`straight_through` takes."""
    form = _form(weight)
    if form == "native":
        numbers, bits = _native_weight(weight, scheme, scale, zero_point, _WHERE_CLIPPED)
        return numbers, bits if bits.numel() else None
    if form == "compiled":
        groups = numerics.to_groups(weight, scheme).flatten(0, 1)
        fixed = [None if part is None else part.reshape(-1, 1) for part in (scale, zero_point)]
        run = _checked(_Key(weight.device, weight.dtype, _flat(scheme), scale is not None))
        numbers, inside = run(groups, *fixed)
        return numbers.reshape(weight.shape), inside.reshape(weight.shape)
    if scale is None:
        scale, zero_point = numerics.choose_qparams(weight, scheme)
    return numerics.on_grid(weight, scale, zero_point, scheme)


def straight_through(x: Tensor, numbers: Tensor, inside: Tensor | None) -> Tensor:
    """``numbers`` forward; backward, the gradient goes to ``x``, where ``inside`` lets it (everywhere for ``None``)."""
    return cast(Tensor, _StraightThrough.apply(x, numbers, inside))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, inside: Tensor | None) -> Tensor:
        ctx.clips = inside is not None
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _kept(grad, ctx.saved_tensors[0] if ctx.clips else None), None, None


def _kept(grad: Tensor, inside: Tensor | None) -> Tensor:
    """The gradient where the grid did not clip."""
    if inside is None:
        return grad
    kept: Tensor = (
        grad * inside if inside.dtype == torch.bool else torch.ops.qat_plugin_native.keep_inside(grad, inside)
    )
    return kept


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
        rounded = learned.learned_scale(scale, scheme)
        zero = None if zero_point is None else learned.learned_zero_point(zero_point, scheme)
        numbers, inside = quantized(weight, scheme, rounded, zero)
        moving = zero_point if zero_point is not None and zero_point.is_floating_point() else None
        ctx.scheme = scheme
        ctx.save_for_backward(weight, numbers, inside, rounded, moving)
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, numbers, inside, rounded, moving = ctx.saved_tensors
        kept = _kept(grad, inside)
        return kept, *learned.learned_gradients(grad, kept, weight, numbers, rounded, moving, ctx.scheme), None


def _form(x: Tensor) -> Form:
    """The form for one tensor."""
    global _native_runs
    if x.dtype not in _TYPES or type(x) not in _PLAIN_CLASSES or x.numel() == 0:
        return "plain"
    kind = x.device.type
    if kind == "cpu" and not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func transforms take no C++ autograd
            return "plain"
        _native_runs = available()
    runs_native = kind == "cpu" and _native_runs
    if _asked is not None:
        return "plain" if _asked == "native" and not runs_native else _asked
    return "native" if runs_native else "compiled" if kind == "cuda" else "plain"


def _native_weight(
    weight: Tensor, scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None, mask: int = 0
) -> tuple[Tensor, Tensor]:
    columns = weight.shape[1]
    if scheme.group_size is not None:
        numerics.check_group_size(columns, scheme)
    group = weight.numel() if scheme.per_tensor else scheme.group_size or columns
    operator = torch.ops.qat_plugin_native.fake_quantize_weight
    return cast(
        tuple[Tensor, Tensor],
        operator(weight, scale, zero_point, group, scheme.weight_bits, scheme.symmetric, mask),
    )


# ------------------------------------------------------------------------------------------------------- torch.compile


class _Key(NamedTuple):
    """What one compiled function is for; sizes are not in it, they are dynamic."""

    device: torch.device
    dtype: torch.dtype
    scheme: Scheme | None  # None: activations
    fixed: bool  # scales are given


def _flat(scheme: Scheme) -> Scheme:
    """The scheme of a weight whose groups are its rows: every granularity is the same code then."""
    return replace(scheme.weight_format, group_size=None, per_tensor=False)


def _weights(scheme: Scheme) -> Callable[..., Any]:
    def weights(groups: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        if scale is None:
            scale, zero_point = numerics.choose_qparams(groups, scheme)
        return numerics.on_grid(groups, scale, zero_point, scheme)

    return weights


@cache
def _checked(key: _Key) -> Callable[..., Any]:
    """The compiled function, or the plain one where that cannot be compiled or gives other bits on a sample."""
    plain = numerics.activation_on_grid if key.scheme is None else _weights(key.scheme)
    sample = _sample(key)
    try:
        compiled = _compile(plain)
        found = compiled(*sample)
        why = "" if _same_bits(found, plain(*sample)) else "its bits are not those of the plain form"
    except Exception as error:  # whatever a compiler, its absence or its cache may raise
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if not why:
        return compiled
    what = "activations" if key.scheme is None else f"{key.scheme} weights"
    warnings.warn(
        f"compiled fake quantization of {what} on {key.device} in {key.dtype} is not used, the plain form is: {why}",
        stacklevel=2,
    )
    return plain


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for all sizes, with a code object of its own: dynamo's recompile_limit counts by code object.

    One function then has at most the four versions of "one group or more" and "groups of one or more" numbers, which
    is below the limit of eight; ``fullgraph`` would make passing it an error.
    """
    from torch._inductor import config

    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    options: dict[str, Any] = {name: True for name in _EXACT if name in config.get_config_copy()}
    return torch.compile(own, dynamic=True, fullgraph=True, options=options)


def _sample(key: _Key) -> tuple[Any, ...]:
    """Rows of many magnitudes, with zeros among them; and the scales that would be chosen, twice too small."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 72, generator=generator) * 10.0 ** torch.arange(-10, 10).repeat(2).unsqueeze(1) / 1e4
    rows[3], rows[:, 5] = 0.0, 0.0
    rows = rows.to(key.device, key.dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    if key.scheme is None:
        return rows, rows.abs().amax().float() / 300 if key.fixed else None
    if not key.fixed:
        return rows, None, None
    scale, zero_point = numerics.choose_qparams(rows, key.scheme)
    return rows, scale / 2, zero_point


def _same_bits(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> bool:
    def same(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None:
            return one is other
        if one.is_floating_point():  # 0.0 and -0.0 differ
            one, other = (part.view(torch.int32 if part.itemsize == 4 else torch.int16) for part in (one, other))
        return torch.equal(one, other)

    return all(map(same, found, expected))
