"""``task=export``, the stage ``exported`` and ``qat_plugin.export``: a converted model in another runtime's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from qat_plugin.config.arguments import RECORD
from qat_plugin.conversion import load_converted
from qat_plugin.errors import ConfigError, QatError
from qat_plugin.exporting import FORMATS, CardFacts, Exported, Format, check_format, export_model, format_named
from qat_plugin.exporting.reading import is_quantized
from qat_plugin.report.files import REPORT_JSON
from qat_plugin.report.json import read_report
from qat_plugin.report.model import Report
from qat_plugin.runs.folder import ADAPTER, CONVERTED, RECIPE
from qat_plugin.runs.journal import say

if TYPE_CHECKING:
    from qat_plugin.config.export_section import ExportConfig
    from qat_plugin.config.launch import Job
    from qat_plugin.config.schema import Config
    from qat_plugin.policy import Plan
    from qat_plugin.runs.subject import Subject

FOLDER: Final = "exported"
_ROWS, _TOKENS = 2, 48


def export(
    model_or_run: nn.Module | str | Path,
    format: str,
    path: str | Path | None = None,
    *,
    tokenizer: Any = None,
    sample: Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Exported:
    """Write a converted model, or that of a run's folder, in another runtime's format, and prove the file.

    Args:
        model_or_run: a converted model, the folder of a run that has one, or a quantized file or folder that
            :func:`qat_plugin.load` reads.
        format: ``"gguf"``, ``"torchao"``, ``"compressed-tensors"``, ``"onnx"``, ``"executorch"`` or ``"converted"``;
            of a run with adapters ``"peft"`` or ``"bitsandbytes"``.
        path: the file or folder to write; of a run by default ``exported/<format>`` in its folder, of a quantized file
            a place beside it.
        tokenizer, sample: of a model; a run brings its own. See
            :func:`~qat_plugin.exporting.export.export_model`.
        options: the format's own.
        verify: read the file back and compare.
        progress: show progress of work longer than two seconds.

    Raises:
        ConfigError: for an unknown format or option, a package that is not installed, a folder that holds no run.
        ExportError: when the format cannot hold the plan, or the file does not hold the model.
    """
    if isinstance(model_or_run, nn.Module):
        if path is None:
            raise ConfigError("export of a model needs a path to write to")
        return export_model(
            model_or_run, format, path,
            tokenizer=tokenizer, sample=sample, options=options, verify=verify, progress=progress,
        )  # fmt: skip
    if tokenizer is not None or sample is not None:
        raise ConfigError("a run brings its own tokenizer and sample: leave tokenizer= and sample= out")
    place = Path(model_or_run).expanduser()
    if not (place / f"{RECORD}.yaml").is_file() and is_quantized(place):
        from qat_plugin.config.export_section import ExportConfig
        from qat_plugin.runs.quantized_file import export_file

        wanted = ExportConfig(format, None if path is None else str(path), dict(options or {}), verify)
        return export_file(place, format_named(format), wanted, progress=progress)
    return _export_folder(model_or_run, format, path, options or {}, verify, progress)


def _export_folder(
    run: str | Path, format: str, path: str | Path | None, options: Mapping[str, Any], verify: bool, progress: bool
) -> Exported:
    from qat_plugin.config.arguments import parse
    from qat_plugin.config.launch import launch
    from qat_plugin.runs.journal import journal

    made: list[Exported] = []
    mistakes: list[QatError] = []

    def work(job: Job) -> int:
        config = job.config
        given = replace(config.export, format=format, options=dict(options), verify=verify)
        if path is not None:
            given = replace(given, path=str(path))
        try:
            with journal(None, verbose=config.verbose):
                made.append(export_of(replace(config, export=given), job, progress=progress))
        except QatError as error:
            mistakes.append(error)
        return 0

    format_named(format)
    launch(parse(["task=export", f"run={run}", f"format={format}"]), work)
    if mistakes:
        raise mistakes[0]
    return made[0]


def export_run(job: Job) -> None:
    """``task=export run=DIR format=NAME``, or ``task=export model.path=FILE format=NAME``.

    Raises:
        ConfigError: when it is not known what to export, or to which format.
    """
    export_of(job.config, job)


def export_of(config: Config, job: Job, *, progress: bool = True) -> Exported:
    """Export the converted model of the folder that ``run.dir`` names, or the quantized file that the model is."""
    from qat_plugin.runs.jobs import subject_of
    from qat_plugin.runs.quantized_file import export_file, quantized_place

    place = quantized_place(config) if config.run.dir is None else None
    if config.run.dir is None and place is None:
        raise ConfigError(
            "task=export needs to know what to export: run=DIR, the folder of a finished run, or model.path=FILE, a "
            "quantized file or folder"
        )
    if config.export.format is None:
        raise ConfigError("task=export needs to know the format: format=gguf, for example")
    if place is not None:
        made = export_file(place, format_named(config.export.format), config.export, checksums=config.model.checksums)
        _tell(made)
        return made
    assert config.run.dir is not None
    folder = Path(config.run.dir).expanduser().absolute()
    config = replace(config, export=_own(config.export, folder))
    check_options(config)
    report = read_report(folder / REPORT_JSON) if (folder / REPORT_JSON).is_file() else None
    return export_from(folder, config, subject_of(job), report, progress=progress)


def _own(wanted: ExportConfig, folder: Path) -> ExportConfig:
    """Without what the run's own recipe says of another format: its path, and options that were not given anew."""
    from omegaconf import OmegaConf

    recorded: Any = OmegaConf.to_container(OmegaConf.load(folder / RECIPE)) if (folder / RECIPE).is_file() else {}
    theirs = recorded.get("export") or {}
    if theirs.get("format") in (None, wanted.format):
        return wanted
    old = theirs.get("options") or {}
    options = {name: value for name, value in wanted.options.items() if name not in old or old[name] != value}
    return replace(wanted, options=options, path=None if wanted.path == theirs.get("path") else wanted.path)


def check_options(config: Config) -> None:
    """Before anything is loaded: is the format for such a run, installed, and does it have these options?

    Raises:
        ConfigError: otherwise.
    """
    from qat_plugin.runs.base_policy import trains_adapters

    if config.export.format is None:
        return
    chosen = format_named(config.export.format)
    if chosen.of_adapters and not trains_adapters(config):
        raise ConfigError(
            f"format={chosen.name} is of adapters, and this recipe trains none; formats of converted models: "
            + ", ".join(name for name, entry in FORMATS.items() if not entry.of_adapters)
        )
    chosen.options(config.export.options)


def check_before(config: Config, subject: Subject, plan: Plan) -> None:
    """Before training: would the format hold what is to be trained? Asked of the untrained model, converted.

    Not for adapters. Static activation scales are calibrated on one batch for it.

    Raises:
        ExportError: when the format cannot hold the plan.
    """
    from qat_plugin.conversion import convert
    from qat_plugin.ptq import calibrate
    from qat_plugin.runs.subject import casting_inputs, network_of

    wanted = config.export
    if wanted.format is None or format_named(wanted.format).of_adapters:
        return
    module = subject.build()
    network = network_of(module).eval()
    if any(layer.scheme is not None and layer.scheme.static for layer in plan):
        with casting_inputs(network):
            calibrate(network, plan, subject.training_batches(1), method="rtn", progress=False)
        convert(network, reversible=False)
    else:
        convert(network, plan, reversible=False)
    tokenizer = getattr(module, "tokenizer", None) if subject.language else None
    check_format(network, wanted.format, tokenizer=tokenizer, sample=_sample(subject), options=wanted.options)


def export_from(
    folder: Path, config: Config, subject: Subject, report: Report | None, *, progress: bool = True
) -> Exported:
    """Export what a run's folder holds as the recipe's section ``export`` says, and say what came of it.

    Raises:
        ConfigError: when the folder does not hold what the format is of.
    """
    wanted = config.export
    assert wanted.format is not None
    chosen = format_named(wanted.format)
    chosen.writer()  # says what is not installed before anything else is done
    default = folder / FOLDER / (f"model{chosen.suffix}" if chosen.suffix else chosen.name)
    facts = CardFacts(
        title=config.name or "",
        recipe=config.name or "",
        command="" if report is None else report.command,
        report=report,
    )
    made = export_model(
        _network(folder, config, subject, chosen),
        chosen.name,
        wanted.path or default,
        tokenizer=getattr(subject.build(), "tokenizer", None) if subject.language else None,
        sample=_sample(subject),
        options=wanted.options,
        verify=wanted.verify,
        facts=facts,
        progress=progress,
    )
    _tell(made)
    return made


def _tell(made: Exported) -> None:
    say(str(made))
    say(f"model card: {made.card}")


def _network(folder: Path, config: Config, subject: Subject, chosen: Format) -> nn.Module:
    """What the format is of, from the run's folder."""
    from qat_plugin import qlora
    from qat_plugin.runs.adapter_ladder import adapt
    from qat_plugin.runs.base_policy import trains_adapters
    from qat_plugin.runs.subject import network_of

    place, what = folder / (ADAPTER if chosen.of_adapters else CONVERTED), "adapter" if chosen.of_adapters else "model"
    if not place.is_dir() or (chosen.of_adapters and not trains_adapters(config)):
        raise ConfigError(
            f"{folder} has no {'' if chosen.of_adapters else 'converted '}{what} ({place.name}/), which "
            f"format={chosen.name} is of: its run did not get that far, or its recipe makes none. Go on with it: "
            f"qat resume={folder}"
        )
    if chosen.of_adapters:
        return qlora.load_adapter(adapt(config, subject.build_base()), place).eval()
    network = network_of(subject.build()).eval()
    device = next(network.parameters()).device
    return load_converted(network, place).to(device)


def _sample(subject: Subject) -> Any:
    """A few held-out examples, as one call of the network takes them."""
    batch = next(iter(subject.held_out()))
    if subject.language:
        return {"input_ids": batch["input_ids"][:_ROWS, :_TOKENS].clone()}
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return (inputs[:_ROWS].clone(),)
