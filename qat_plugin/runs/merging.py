"""``task=merge``: an adapter folded into its base shard by shard, and what each way of storing the result costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_plugin import qlora
from qat_plugin import report as reporting
from qat_plugin.config.launch import Job
from qat_plugin.config.options import InstructionFiles, TextFiles
from qat_plugin.config.schema import Config
from qat_plugin.conversion import convert as convert_model
from qat_plugin.conversion import proof_of, save_converted
from qat_plugin.errors import ConfigError
from qat_plugin.kernels.torchao_import import known_noise_dropped
from qat_plugin.measure import file_bytes, model_bytes
from qat_plugin.measure.host_memory import available_bytes
from qat_plugin.policy import human_bytes
from qat_plugin.qat import capture_inputs, prepare
from qat_plugin.qat import is_prepared as is_fake_quantized
from qat_plugin.qlora.extra import check_extra
from qat_plugin.qlora.merge import check_requantization, survival_table
from qat_plugin.qlora.merge_files import not_verified, updated_weights
from qat_plugin.report import Report, Row
from qat_plugin.runs.adapter_ladder import adapt
from qat_plugin.runs.base_policy import trains_adapters
from qat_plugin.runs.folder import ADAPTER, MERGED
from qat_plugin.runs.journal import say
from qat_plugin.runs.language_model import model_directory
from qat_plugin.runs.planning import check_merge_schemes
from qat_plugin.runs.subject import network_of
from qat_plugin.runs.training import accelerator_of
from qat_plugin.scheme import Scheme


def merge_run(job: Job) -> None:
    """Merge the adapter of a run (or any) into its base, print what survives of the update, convert if asked.

    Raises:
        ConfigError: when it is not known what to merge, or the result would be NF4 again.
        CheckpointError: when the files are damaged or do not belong together.
    """
    config = job.config
    run = None if config.run.dir is None else Path(config.run.dir).expanduser().absolute()
    if run is None and config.merge.adapter is None:
        raise ConfigError(
            "task=merge needs to know what to merge: run=DIR (a run of adapters), or merge.adapter=DIR with "
            "model=transformers model.path=BASE merge.out=DIR"
        )
    if config.merge.adapter is None and config.merge.out is None and run is None:
        raise ConfigError("task=merge needs merge.out=DIR, the folder to write")
    check_extra(config.lora.backend)
    check_merge_schemes(config)
    adapter = Path(config.merge.adapter) if config.merge.adapter else _inside(run, ADAPTER)
    out = Path(config.merge.out) if config.merge.out else _inside(run, f"{MERGED}-{config.merge.into}")
    base = model_directory(config)
    place = _converted_place(config, out)
    if config.merge.scheme is not None and place is None:
        try:
            check_requantization(
                config.merge.scheme, lambda: updated_weights(base, adapter), accept_loss=config.merge.accept_loss
            )
        except ConfigError as error:
            raise ConfigError(f"merge.scheme={config.merge.scheme}: {error}") from error
    record = qlora.merge_directory(base, adapter, out, into=config.merge.into)  # type: ignore[arg-type]
    say(f"merged {record.merged} layers in {record.seconds:.0f} s")
    report = Report(f"Merging {adapter}", survival=_survival(config.merge.compare, base, adapter))
    every = _measurable(config, record.bytes_written)
    if config.merge.scheme is not None or every:
        report = replace(report, rows=tuple(_ladder(job, adapter, out, run, place, every=every)))
    report = reporting.with_verdict(report)
    if not record.verified:
        report = replace(report, verdict=(not_verified(base, adapter), *report.verdict))
    reporting.print_report(report)
    say(f"\nmerged model: {out} ({human_bytes(record.bytes_written)})")
    if place is not None:
        say(f"converted to {config.merge.scheme}: {place} ({human_bytes(file_bytes(place))})")
    say(f"report: {reporting.write_report(report, out)[1]}")


def _converted_place(config: Config, out: Path) -> Path | None:
    """Where the merged model is converted to, beside it; ``None`` for no conversion, and for NF4, which is no format.

    Raises:
        ConfigError: when something is there already.
    """
    scheme = config.merge.scheme
    if scheme is None or Scheme.parse(scheme).kind == "nf4":
        return None
    place = out.with_name(f"{out.name}-{scheme}")
    if place.exists():
        raise ConfigError(
            f"merge.scheme={scheme} is written into {place}, which is there already: give another merge.out, or "
            "merge.scheme=null"
        )
    return place


def _inside(run: Path | None, name: str) -> Path:
    if run is None:
        raise ConfigError(f"task=merge needs merge.{'out' if name != ADAPTER else 'adapter'}=DIR, or run=DIR")
    return run / name


def _survival(schemes: list[str], base: Path, adapter: Path) -> tuple[dict[str, Any], ...]:
    """What of the update each choice keeps, layer by layer."""
    trained_on = qlora.read_adapter(adapter).scheme or "nf4-dq"
    asked = [*schemes, *([trained_on] if Scheme.parse(trained_on).kind == "nf4" else [])]
    rows = survival_table(updated_weights(base, adapter), asked, base=trained_on, dtype=torch.bfloat16)
    return tuple(row.to_dict() for row in rows)


def _measurable(config: Config, size: int) -> bool:
    """Whether there is text to measure on, and memory for the merged model beside a copy of it."""
    if config.merge.evaluate is not None:
        return config.merge.evaluate
    if isinstance(config.data, (TextFiles, InstructionFiles)) and not config.data.train:
        say("perplexities are not measured: there is no text; give data.train=FILE data.valid=FILE")
        return False
    there = available_bytes(accelerator_of(config.trainer))
    if there is not None and 2 * size > there:
        say(
            f"perplexities are not measured: the merged model takes {human_bytes(size)}, available are "
            f"{human_bytes(there)}; merge.evaluate=true tries all the same"
        )
        return False
    return True


def _ladder(
    job: Job, adapter: Path, merged: Path, run: Path | None, place: Path | None, *, every: bool
) -> Iterator[Row]:
    """With ``every``, the adapter on its base, the merged model, and that in each scheme; then the converted one."""
    from qat_plugin.runs.jobs import subject_of

    config, subject = job.config, subject_of(job)
    build_from = subject.build_from
    assert build_from is not None

    def measured(name: str, network: nn.Module, note: str = "") -> Row:
        say(f"measuring: {name}")
        size = model_bytes(network) if not is_fake_quantized(network) else None
        return Row(name, subject.evaluate(network, None), size, note=note)

    if every and run is not None and trains_adapters(config):
        network = adapt(config, subject.build_base())
        if not is_fake_quantized(network):  # its merged model has the scales of training: that is in the run's report
            qlora.load_adapter(network, adapter)
            yield measured(reporting.QLORA, network.eval(), "the adapter on the base that it was trained on")
    if every:
        yield measured(reporting.MERGED, network_of(build_from(merged)).eval())
    for scheme in config.merge.compare if every else ():
        network = prepare(network_of(build_from(merged)).eval(), scheme)
        yield measured(f"{reporting.MERGED}, {scheme}", network, "merged, then rounded to nearest")
    if config.merge.scheme is None:
        return
    if place is None:
        with known_noise_dropped():
            network = qlora.load_base(merged, config.merge.scheme, dtype=torch.float32)[0].eval()
        note = "merged, then NF4 again, as when it is loaded as a base; nothing is written"
        yield measured(f"{reporting.MERGED}, {config.merge.scheme}", network.to(accelerator_of(config.trainer)), note)
    else:
        network = prepare(network_of(build_from(merged)).eval(), config.merge.scheme)
        with capture_inputs(network) as inputs:
            subject.evaluate(network, None, subject.training_batches(1))
        convert_model(network, inputs=inputs)
        save_converted(network, place)
        yield measured(reporting.CONVERTED, network, f"{config.merge.scheme}, in {place}; {proof_of(network)}")
