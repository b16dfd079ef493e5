"""What a checkpoint carries of fake quantization beside the float state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qat_plugin.errors import CheckpointError, did_you_mean
from qat_plugin.observers.spelling import DEFAULT_FOR_TRAINING
from qat_plugin.qat.folding import fold_names, set_folds
from qat_plugin.qat.initial import Initial, check_initial
from qat_plugin.qat.layers import ATTRIBUTE, current_weight
from qat_plugin.qat.prepare import get_phase, plan_of, quantizers, required_layers
from qat_plugin.qat.quantizer import LayerQuantizer, Phase
from qat_plugin.qat.watching import observer_of

STATE_VERSION = 1


def quantizer_state(model: nn.Module) -> dict[str, Any]:
    """Phases, plan, scales and observers, as primitives and CPU tensors that ``torch.load(weights_only=True)`` reads.

    It belongs beside the model's (float) state_dict in a checkpoint. ``phase`` is the model's; ``phases`` has the
    layers in another one (:func:`~qat_plugin.qat.hold`), if there are any.

    Raises:
        PrepareError: when the model is not prepared.
    """
    phase, mine = get_phase(model), quantizers(model)
    apart = {name: quantizer.phase.value for name, quantizer in mine.items() if quantizer.phase is not phase}
    learned = next((quantizer.initial for quantizer in mine.values() if quantizer.learns_scales), None)
    return {
        "version": STATE_VERSION,
        "phase": phase.value,
        **({"phases": apart} if apart else {}),
        **({} if learned is None else {"initial": learned}),
        "plan": plan_of(model).without_kernels().to_list(),
        "folded": fold_names(model),
        "layers": {name: quantizer.export_state() for name, quantizer in mine.items()},
        **({} if (observer := observer_of(model)) is None else {"observer": str(observer)}),
    }


def load_quantizer_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what :func:`quantizer_state` saved, into a model prepared with the same plan.

    Learned scales that had not begun then begin as they would have there (``initial``).

    Raises:
        PrepareError: when the model is not prepared.
        CheckpointError: when the state's version, layers, schemes or observer differ; nothing is changed then.
    """
    layers = required_layers(model)
    try:
        version = state["version"]
        if version != STATE_VERSION:
            raise CheckpointError(f"quantizer state of version {version!r}; this package reads {STATE_VERSION}")
        Phase(state["phase"])
        tensors, initial = state["layers"], initial_in(state)
        theirs = {entry["name"]: entry["scheme"] for entry in state["plan"] if entry["scheme"] is not None}
        states = {name: dict(tensors[name]) for name in theirs}
        phases = {name: phase_in(state, name) for name in theirs}
        folded = [tuple(map(str, pair)) for pair in state.get("folded", ())]
        if unknown := sorted(set(state.get("phases", {})) - set(theirs)):
            raise CheckpointError(f"the checkpoint has phases of layers that its plan has not: {', '.join(unknown)}")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"this is not a quantizer state ({type(error).__name__}: {error})") from error
    mine: dict[str, LayerQuantizer] = {name: getattr(layer, ATTRIBUTE) for name, layer in layers.items()}
    _check_same_schemes(mine, theirs)
    here = observer_of(model)
    if here is not None and str(here) != (there := observer_in(state)):
        raise CheckpointError(
            f"the checkpoint's static schemes were observed by {there!r}, this model's are by {str(here)!r}: prepare "
            f"it with observer={there!r}"
        )
    for name, quantizer in mine.items():
        quantizer.check_state(states[name], phases[name])
    set_folds(model, folded)
    for name, quantizer in mine.items():
        quantizer.import_state(states[name], phases[name], current_weight(layers[name]).device)
        quantizer.initial = initial or quantizer.initial


def observer_in(state: Mapping[str, Any]) -> str:
    """What observed the static schemes of a quantizer state; those of earlier versions do not say."""
    return str(state.get("observer", DEFAULT_FOR_TRAINING))


def phase_in(state: Mapping[str, Any], layer: str) -> Phase:
    """The phase of a layer in a quantizer state.

    Raises:
        KeyError, ValueError: when the state does not tell, or tells no phase.
    """
    return Phase(state.get("phases", {}).get(layer, state["phase"]))


def initial_in(state: Mapping[str, Any]) -> Initial | None:
    """Where the learned scales of a quantizer state begin; ``None`` for those of earlier versions and unlearned ones.

    Raises:
        ConfigError: for an unknown way.
    """
    found: Initial | None = state.get("initial")
    if found is not None:
        check_initial(found)
    return found


def _check_same_schemes(mine: Mapping[str, LayerQuantizer], theirs: Mapping[str, str]) -> None:
    here = {name: str(quantizer.scheme) for name, quantizer in mine.items()}
    for name in sorted(theirs.keys() | here.keys()):
        if theirs.get(name) != here.get(name):
            there, mine_here = theirs.get(name, "not quantized"), here.get(name, "not quantized")
            raise CheckpointError(
                f"the checkpoint's plan differs from this model's at {name}: {there} there, {mine_here} here."
                f"{did_you_mean(name, theirs.keys() - {name})} Resume with the policy the checkpoint was made with"
            )
