"""The fake quantization of one layer: its scheme, phase, scales and observer."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qat_plugin.fused as fused
from qat_plugin.errors import CheckpointError, DataError, PrepareError
from qat_plugin.numerics import (
    Quantized,
    choose_qparams,
    divided_input,
    fake_cast,
    quantize,
)
from qat_plugin.observers.factory import make_observer
from qat_plugin.observers.observer import Observer
from qat_plugin.observers.spelling import DEFAULT_FOR_TRAINING, ObserverSpec
from qat_plugin.policy import LayerPlan, Plan
from qat_plugin.qat.grid import LearnedGrid
from qat_plugin.qat.initial import Initial, initial_scales
from qat_plugin.qat.input_scale import wrong_input_scale
from qat_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qat_plugin.qat.reuse import WeightReuse


class Phase(enum.Enum):
    """Where quantization-aware training stands.

    ``FLOAT``: layers compute as before. ``OBSERVING``: the same, while static schemes watch training activations.
    ``FAKE_QUANTIZED``: the forward pass sees quantized numbers. ``FROZEN``: the same with scales that no longer move.
    """

    FLOAT = "float"
    OBSERVING = "observing"
    FAKE_QUANTIZED = "fake-quantized"
    FROZEN = "frozen"


class LayerQuantizer(nn.Module):
    """Fake quantization of one layer, a submodule of it that no state_dict shows.

    Args:
        layer: the layer's plan; its scheme is a float or an integer one.
        plan: the whole plan, so that any prepared layer can tell it.
        weight: the layer's weight as its module holds it.
        transposed: the module's weight is [in_features, out_features].
        learn_scales: learn the scales (LSQ) in a :class:`~qat_plugin.qat.grid.LearnedGrid`, ``grid``.
        learn_zero_points: learn the zero points with them.
        initial: where learned ones begin, see :func:`~qat_plugin.qat.initial.initial_scales`.
        share: the quantizer of the layer this one is tied to; they learn one grid.
        observer: what a static scheme calibrates its activations with.

    Attributes:
        input_scale: float32 [in_features], positive, or ``None``. With it the forward pass is ``x / s`` times the
            fake-quantized ``W s``; the weight itself stays the float model's.
    """

    grid: LearnedGrid | None
    frozen_scale: Tensor | None
    frozen_zero_point: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        layer: LayerPlan,
        plan: Plan,
        weight: Tensor,
        *,
        transposed: bool,
        learn_scales: bool,
        learn_zero_points: bool = False,
        initial: Initial = "minmax",
        share: LayerQuantizer | None = None,
        observer: str | ObserverSpec = DEFAULT_FOR_TRAINING,
    ) -> None:
        super().__init__()
        assert layer.scheme is not None
        self.layer, self.plan, self.transposed = layer, plan, transposed
        self.scheme: Scheme = layer.scheme
        self.phase, self.initial = Phase.FLOAT, initial
        self.observe_always = False
        self.reuse: WeightReuse | None = None
        self.observer = _hidden(make_observer(observer)) if self.scheme.static else None
        for name in ("frozen_scale", "frozen_zero_point", "input_scale"):
            self.register_buffer(name, None, persistent=False)
        self.grid = None
        if learn_scales and self.scheme.is_integer:
            one_format = share is not None and share.scheme.weight_format == self.scheme.weight_format
            shared = share.grid if share is not None and one_format else None
            if shared is None:
                begin = initial_scales(self.rows(weight.detach()), self.scheme, initial)
                shared = LearnedGrid(*begin, self.scheme, learn_zero_points=learn_zero_points)
            self.grid = shared
        fused.implementation(weight.device)  # builds native operators now, not in the first step
        # nn.TransformerEncoderLayer leaves its fused inference path, which would read the float weights, when any
        # submodule has a hook; this one has.
        self.register_forward_pre_hook(_never_called)

    @property
    def learns_scales(self) -> bool:
        """Whether the scales are learned."""
        return self.grid is not None

    @property
    def active(self) -> bool:
        """Whether the forward pass sees quantized numbers."""
        return self.phase in (Phase.FAKE_QUANTIZED, Phase.FROZEN)

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as [out_features, in_features]; a convolution's as [out_channels, everything else]."""
        if self.layer.usage == "conv":
            return weight.flatten(1)
        return weight.t() if self.transposed else weight

    def as_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows in the orientation and shape of ``weight``: the inverse of :meth:`rows`."""
        return rows.t() if self.transposed else rows.reshape(weight.shape)

    def scaled_rows(self, weight: Tensor) -> Tensor:
        """What the integers are taken of, [out_features, in_features]: the rows, times the input scale in float32."""
        rows = self.rows(weight)
        return rows if self.input_scale is None else rows * self.input_scale

    def fake_weight(self, rows: Tensor) -> Tensor:
        """Fake-quantized [rows, in_features], of ``W s`` where there is an input scale; differentiable."""
        if self.input_scale is None:
            return self._on_grid(rows)
        return self._on_grid(rows * self.input_scale).to(rows.dtype)

    def _on_grid(self, rows: Tensor) -> Tensor:
        if self.scheme.is_float:
            return fake_cast(rows, self.scheme.float_dtype)
        if self.frozen_scale is not None:
            return fused.fake_quantize(rows, self.scheme, self.frozen_scale, self.frozen_zero_point)
        if self.grid is not None:
            return fused.fake_quantize_learned(rows, self.grid.scale(), self.grid.zero_point(), self.scheme)
        return fused.fake_quantize(rows, self.scheme)

    def fake_parameter(self, weight: Tensor) -> Tensor:
        """The layer's own weight, as its module holds it, as fake-quantized [out_features, in_features].

        Inside :func:`~qat_plugin.qat.reusing_weights`, one that did not change is not quantized again.
        """
        learning = self.grid is not None and self.frozen_scale is None  # the scales' gradient needs the weight
        reusable = self.scheme.is_integer and not learning and isinstance(weight, nn.Parameter)
        if self.reuse is None or not reusable or torch.compiler.is_compiling():
            return self.fake_weight(self.rows(weight))
        return self.reuse.fake_weight(self, weight)

    @property
    def rows_stand_alone(self) -> bool:
        """Whether looked-up rows can be fake-quantized by themselves: when their scales come from them alone."""
        return self.scheme.is_float or not (self.fixed or self.scheme.per_tensor)

    @property
    def fixed(self) -> bool:
        """Whether the scales in force are learned or frozen, and not those of the weight's range."""
        return self.learns_scales or self.frozen_scale is not None

    def fake_input(self, x: Tensor) -> Tensor:
        """The fake-quantized input of the layer; observes it where that is due."""
        if x.is_nested:  # nn.TransformerEncoder packs padded batches in inference
            sequences = x.unbind()
            packed = self.fake_input(torch.cat(sequences))
            parts = packed.split([len(sequence) for sequence in sequences])
            return torch.nested.as_nested_tensor(list(parts), layout=x.layout)
        if self.input_scale is not None:
            return self._fake_divided(x, self.input_scale)
        self.observe(x)
        return self._fake_activation(x)

    def _fake_divided(self, x: Tensor, input_scale: Tensor) -> Tensor:
        divided = divided_input(x, input_scale, self.scheme)
        self.observe(divided)
        return self._fake_activation(divided).to(x.dtype) if self.active else x

    def _fake_activation(self, x: Tensor) -> Tensor:
        if not self.scheme.quantizes_activations or not self.active or not x.is_floating_point():
            return x
        if self.observer is None:
            return fused.fake_quantize_activation(x)
        return fused.fake_quantize_activation(x, self.observer.scale()) if self.observer.has_data else x

    def observe(self, x: Tensor) -> None:
        """Let a static scheme see the input: in training and before freezing only.

        Gradient checkpointing repeats the forward pass inside the backward pass: that one does not count.

        Raises:
            DataError: for NaN or infinity; in training on an accelerator, which would have to wait for the answer,
                :func:`~qat_plugin.qat.synchronize_observers` raises it after the batch.
        """
        if self.observer is None or self.phase in (Phase.FLOAT, Phase.FROZEN):
            return
        if self.observe_always or (self.training and torch._C._current_graph_task_id() == -1):
            self.observer(x)
            if (self.observe_always or x.device.type == "cpu") and not torch.compiler.is_compiling():
                self.check_observed()

    def check_observed(self) -> None:
        """Raise when the observer saw what no scale fits.

        Raises:
            DataError: naming the layer.
        """
        if self.observer is not None and not self.observer.is_finite:
            raise DataError(
                f"{self.layer.name} ({self.scheme}): its input holds NaN or infinity, for which there is no scale. "
                "Look for a bad batch, a diverged loss or an overflow of fp16, and begin again from a checkpoint or a "
                "fresh prepare(): what was observed so far is spoilt"
            )

    def observe_with(self, observer: str | ObserverSpec) -> None:
        """Begin anew with an observer of this kind; nothing happens to schemes that are not static."""
        if self.observer is not None:
            self.observer = _hidden(make_observer(observer)).to(self.observer.absmax.device)

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scales and zero points in force for a weight as its module holds it."""
        if self.frozen_scale is not None:
            return self.frozen_scale, self.frozen_zero_point
        if self.grid is not None:
            return self.grid.qparams()
        return choose_qparams(self.scaled_rows(weight), self.scheme)

    def integers(self, weight: Tensor) -> Quantized:
        """The integers that the fake-quantized forward stands for."""
        return quantize(self.scaled_rows(weight), *self.qparams(weight), self.scheme)

    def activation_scale(self) -> Tensor | None:
        """The calibrated scale of a static scheme, float32 scalar; ``None`` for others.

        Raises:
            PrepareError: when no activation was seen.
            DataError: when one was NaN or infinite.
        """
        if self.observer is None:
            return None
        self.check_observed()
        if not self.observer.has_data:
            raise PrepareError(
                f"{self.layer.name} ({self.scheme}) saw no activation: calibrate it first, by training batches or by a "
                "forward pass inside `with calibrating(model):`"
            )
        return self.observer.scale()

    def enter(self, phase: Phase, weight: Tensor) -> None:
        """Move to a phase; freezing fixes the scales in force now, leaving it releases them."""
        if phase is Phase.FROZEN and self.scheme.is_integer and self.frozen_scale is None:
            scale, zero_point = self.qparams(weight)
            self.frozen_scale = scale.clone()
            self.frozen_zero_point = None if zero_point is None else zero_point.clone()
        if phase is not Phase.FROZEN:
            self.frozen_scale = self.frozen_zero_point = None
        self.phase = phase

    def begin(self, weight: Tensor) -> None:
        """Let learned scales begin from a weight as its module holds it; nothing for others."""
        if self.grid is not None:
            self.grid.hold(*initial_scales(self.scaled_rows(weight.detach()), self.scheme, self.initial))

    def hold(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Take scales and zero points from elsewhere: learned ones start from them, others are frozen to them."""
        if self.grid is not None:
            self.grid.hold(scale, zero_point)
        if self.grid is not None and self.frozen_scale is None:
            return
        self.frozen_scale, self.frozen_zero_point = scale.clone(), zero_point
        self.phase = Phase.FROZEN

    def start_anew(self, weight: Tensor) -> None:
        """Take scales from the weight as it is now, and forget the activations seen: one of them was rescaled."""
        frozen, self.frozen_scale, self.frozen_zero_point = self.frozen_scale is not None, None, None
        self.begin(weight)
        if frozen:
            self.enter(self.phase, weight)
        if self.observer is not None:
            self.observe_with(self.observer.spec)

    def export_state(self) -> dict[str, Tensor]:
        """Scales and observer statistics, as tensors on the CPU."""
        tensors = {} if self.grid is None else self.grid.export_state()
        tensors |= {name: getattr(self, name) for name in ("frozen_scale", "frozen_zero_point", "input_scale")}
        if self.observer is not None:
            tensors |= dict(self.observer.named_buffers())
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if tensor is not None}

    def check_state(self, state: Mapping[str, Tensor], phase: Phase) -> None:
        """Raise unless :meth:`import_state` can take the state whole.

        Raises:
            CheckpointError: naming the layer, when a tensor is missing, unknown or of another shape.
        """
        name = self.layer.name
        if ("scale" in state) != self.learns_scales:
            raise CheckpointError(
                f"{name}: the checkpoint was made with learn_scales={'scale' in state}, this model is prepared with "
                f"learn_scales={self.learns_scales}"
            )
        due = set() if self.grid is None else set(self.grid.export_state())
        watched = {} if self.observer is None else dict(self.observer.named_buffers())
        due |= watched.keys()
        if phase is Phase.FROZEN and self.scheme.is_integer:
            due |= {"frozen_scale"} if self.scheme.symmetric else {"frozen_scale", "frozen_zero_point"}
        if wrong := sorted(due ^ (state.keys() - {"input_scale"})):
            raise CheckpointError(
                f"{name} ({self.scheme}): the checkpoint's {', '.join(wrong)} is missing or unexpected"
            )
        for key, value in state.items():
            shape = tuple(watched[key].shape) if key in watched else self.scale_shape
            if key == "input_scale" and isinstance(value, Tensor):
                if wrong_scale := wrong_input_scale(self, value):
                    raise CheckpointError(f"the checkpoint's input_scale: {wrong_scale}")
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise CheckpointError(f"{name}: the checkpoint's {key} has shape {given}, this layer's is {shape}")

    def import_state(self, state: Mapping[str, Tensor], phase: Phase, device: torch.device) -> None:
        """The inverse of :meth:`export_state`, after :meth:`check_state`."""
        if self.grid is not None:
            self.grid.import_state(state)
        for name in ("frozen_scale", "frozen_zero_point", "input_scale"):
            value = state.get(name)
            setattr(self, name, None if value is None else value.detach().clone().to(device))
        if self.observer is not None:
            self.observer.restore(state)
        self.phase = phase

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the layer's scales."""
        rows, columns = self.layer.shape
        return (1, 1) if self.scheme.per_tensor else (rows, columns // (self.scheme.group_size or columns))

    def extra_repr(self) -> str:
        """Scheme, phase, and whether scales are learned."""
        return f"{self.scheme}, phase={self.phase.value}" + (", learned scales" if self.learns_scales else "")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a prepared model's state_dict is the float model's."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Empty, the observer's buffers included."""
        return kwargs.get("destination") if kwargs.get("destination") is not None else {}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is missing, nothing is read."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerQuantizer:
        """Follow the layer to a device, never to a narrower float type: scales stay float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


def _hidden(observer: Observer) -> Observer:
    """An observer that no state_dict shows and none has to fill."""
    for name, buffer in list(observer.named_buffers()):
        observer.register_buffer(name, buffer, persistent=False)
    return observer


def _never_called(module: nn.Module, args: Any) -> None:
    """See :class:`LayerQuantizer`."""
