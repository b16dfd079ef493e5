"""Tasks on a quantized file or folder as it is: measured on its integer kernels, or written in another format."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat_plugin import report as reporting
from qat_plugin.config.options import TransformersModel
from qat_plugin.conversion.convert import conversion_of, is_converted
from qat_plugin.errors import CheckpointError, ConfigError
from qat_plugin.exporting import CardFacts, Exported, Format, export_model, load
from qat_plugin.exporting.reading import is_quantized
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.measure import evaluate_lm, file_bytes, model_bytes, parameter_count
from qat_plugin.policy import Plan
from qat_plugin.report import Report, Row
from qat_plugin.runs.language_model import language_data, model_files
from qat_plugin.runs.subject import first_loader
from qat_plugin.runs.training import accelerator_of

if TYPE_CHECKING:
    from qat_plugin.config.export_section import ExportConfig
    from qat_plugin.config.schema import Config


def quantized_place(config: Config) -> Path | None:
    """Where the recipe's model lies when it is quantized; ``None`` for any other model.

    Raises:
        DataError: when there is nothing.
        CheckpointError: when it is quantized by a method that is not read here.
    """
    if not isinstance(config.model, TransformersModel):
        return None
    place = model_files(config)
    return place if is_quantized(place) else None


def evaluate_file(config: Config, place: Path) -> None:
    """Measure what a file holds on this device's kernels, not the float numbers that it stands for, and print it.

    Raises:
        CheckpointError: when it cannot be read, or has no tokenizer.
        DataError: for text that cannot be used.
    """
    bf16 = config.trainer.precision == "bf16-true"
    with known_noise_dropped():
        network, tokenizer = load(
            place, dtype=torch.bfloat16 if bf16 else torch.float32, checksums=config.model.checksums
        )
    if tokenizer is None:
        raise CheckpointError(f"{place} has no tokenizer that can be built here: text cannot be made its tokens")
    network = network.to(accelerator_of(config.trainer)).eval()
    data = language_data(config, tokenizer)
    text = getattr(config.data, "valid", None) or "the embedded text (Python's standard library)"
    print(f"measured on {text}; other text: data=text data.train=FILE data.valid=FILE", file=sys.stderr)
    metrics = evaluate_lm(network, first_loader(data.val_dataloader()))
    title = f"{config.name or 'a model'}: evaluate {place}, on its own integers"
    row = Row(place.name, metrics, model_bytes(network), file_bytes(place))
    report = Report(title, rows=(row,), parameters=parameter_count(network))
    reporting.print_report(report)
    for line in kernel_lines(conversion_of(network).plan) if is_converted(network) else ["nothing in it is quantized"]:
        print(line)


def kernel_lines(plan: Plan) -> list[str]:
    """One line for each kernel and scheme: how many layers it runs, and what to know about it; then what is float."""
    kinds = Counter((str(layer.scheme), layer.kernel, layer.note) for layer in plan.quantized)
    lines = [
        f"kernel {kernel}: {count} x {scheme}" + (f" ({note})" if note else "")
        for (scheme, kernel, note), count in kinds.items()
    ]
    return ["", plan.summary(), *lines]


def export_file(
    place: Path, chosen: Format, wanted: ExportConfig, *, checksums: bool = True, progress: bool = True
) -> Exported:
    """Write what a quantized file holds in another format: the same integers and scales.

    Args:
        place: the file or folder.
        chosen: the format.
        wanted: the section ``export`` of a recipe.
        checksums: as :func:`~qat_plugin.exporting.reading.load` takes it.
        progress: show progress of work longer than two seconds.

    Raises:
        ConfigError: when the format is of adapters, or what would be written is there already.
        CheckpointError: when it cannot be read.
        ExportError: when the format cannot hold it.
    """
    if chosen.of_adapters:
        raise ConfigError(f"format={chosen.name} is of a run's adapter (run=DIR), and {place} is a quantized model")
    target = _target(place, chosen, wanted.path)
    chosen.options(wanted.options)  # a misspelt option shows before anything is read
    with known_noise_dropped():
        network, tokenizer = load(place, checksums=checksums)
    return export_model(
        network,
        chosen.name,
        target,
        tokenizer=tokenizer,
        options=wanted.options,
        verify=wanted.verify,
        facts=CardFacts(title=place.name),
        progress=progress,
    )


def _target(place: Path, chosen: Format, path: str | None) -> Path:
    """What to write: by default beside the source, and never over anything."""
    place = place.absolute()
    if path is None:
        stem = place.stem if place.is_file() else place.name
        beside = place.with_name(f"{stem}{chosen.suffix}" if chosen.suffix else f"{stem}-{chosen.name}")
        if beside.exists():
            raise ConfigError(f"{beside}, where this would be written, is there already: give export.path=PATH")
        return beside
    given = Path(path).expanduser().absolute()
    if place.resolve() in (given.resolve(), given.with_name(given.name + chosen.suffix).resolve()):
        raise ConfigError(f"export.path={path} is what is read: give another")
    return given
