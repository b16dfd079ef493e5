"""``task=merge``: an adapter folded into its base shard by shard, and what each way of storing the result costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qat_plugin import qlora
from qat_plugin import report as reporting
from qat_plugin.config.launch import Job
from qat_plugin.conversion import convert as convert_model
from qat_plugin.conversion import save_converted
from qat_plugin.errors import ConfigError
from qat_plugin.policy import human_bytes
from qat_plugin.qat import capture_inputs, prepare
from qat_plugin.qlora.merge import check_requantization, survival_table
from qat_plugin.qlora.merge_files import updated_weights
from qat_plugin.report import Report
from qat_plugin.runs.folder import ADAPTER, MERGED
from qat_plugin.runs.journal import say
from qat_plugin.runs.language_model import model_directory
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
    adapter = Path(config.merge.adapter) if config.merge.adapter else _inside(run, ADAPTER)
    out = Path(config.merge.out) if config.merge.out else _inside(run, f"{MERGED}-{config.merge.into}")
    base = model_directory(config)
    if config.merge.scheme and Scheme.parse(config.merge.scheme).kind == "nf4":
        check_requantization(
            config.merge.scheme, lambda: updated_weights(base, adapter), accept_loss=config.merge.accept_loss
        )
        raise ConfigError(
            f"merge.scheme={config.merge.scheme}: NF4 is a base to train adapters on and no format to ship; merge with "
            "merge.scheme=null and load the result as an NF4 base where it is needed"
        )
    record = qlora.merge_directory(base, adapter, out, into=config.merge.into)  # type: ignore[arg-type]
    say(f"merged {record.merged} layers into {out} ({human_bytes(record.bytes_written)}, {record.seconds:.0f} s)")
    _print_survival(config.merge.compare, base, adapter)
    if config.merge.scheme is not None:
        _convert(job, out, out.with_name(f"{out.name}-{config.merge.scheme}"))


def _inside(run: Path | None, name: str) -> Path:
    if run is None:
        raise ConfigError(f"task=merge needs merge.{'out' if name != ADAPTER else 'adapter'}=DIR, or run=DIR")
    return run / name


def _print_survival(schemes: list[str], base: Path, adapter: Path) -> None:
    trained_on = qlora.read_adapter(adapter).scheme or "nf4-dq"
    asked = [*schemes, *([trained_on] if Scheme.parse(trained_on).kind == "nf4" else [])]
    rows = survival_table(updated_weights(base, adapter), asked, base=trained_on, dtype=torch.bfloat16)
    report = Report("Merging", survival=tuple(row.to_dict() for row in rows))
    reporting.print_report(reporting.with_verdict(report))


def _convert(job: Job, merged: Path, place: Path) -> None:
    """The merged model in an integer scheme, proven on real inputs, and its quality beside the merged one's."""
    from qat_plugin.runs.jobs import subject_of
    from qat_plugin.runs.subject import network_of

    subject, scheme = subject_of(job), job.config.merge.scheme
    assert subject.build_from is not None
    assert scheme is not None
    reference = network_of(subject.build_from(merged)).eval()
    network = prepare(network_of(subject.build_from(merged)).eval(), scheme)
    with capture_inputs(network) as inputs:
        subject.evaluate(network, None, subject.training_batches(1))
    convert_model(network, inputs=inputs)
    save_converted(network, place)
    rows = (
        reporting.Row(reporting.MERGED, subject.evaluate(reference, None)),
        reporting.Row(reporting.CONVERTED, subject.evaluate(network, reference)),
    )
    reporting.print_report(replace(Report(f"{scheme}: {place}"), rows=rows))
