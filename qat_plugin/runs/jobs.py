"""What each task does, and what the process answers: 0, 2 for a mistake, 130 when it was stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import lightning as L
import torch

from qat_plugin import qlora
from qat_plugin import report as reporting
from qat_plugin.config.catalogue import recipes
from qat_plugin.config.launch import Job
from qat_plugin.config.schema import LADDER, Config
from qat_plugin.config.typed import option_of
from qat_plugin.conversion import load_converted
from qat_plugin.errors import ConfigError, QatError
from qat_plugin.measure import file_bytes, model_bytes, parameter_count
from qat_plugin.policy import Plan
from qat_plugin.qlora.extra import check_extra
from qat_plugin.report import Report, Row
from qat_plugin.report.files import REPORT_JSON
from qat_plugin.runs.adapter_ladder import AdapterLadder, adapt
from qat_plugin.runs.base_policy import policy_of, trains_adapters
from qat_plugin.runs.choosing import POLICY, bounds, choices_in, chosen_policy, rank
from qat_plugin.runs.custom import custom_subject
from qat_plugin.runs.doctor import examination
from qat_plugin.runs.exporting import FOLDER as EXPORTED
from qat_plugin.runs.exporting import check_before, check_options, export_run
from qat_plugin.runs.folder import ADAPTER, CONVERTED, MERGED, RunFolder, open_folder
from qat_plugin.runs.forecasting import WILL_NOT_FIT, choose_card, forecast_run
from qat_plugin.runs.image_net import image_subject
from qat_plugin.runs.interruption import EXIT_CODE, Interrupted, Interruptions
from qat_plugin.runs.journal import journal, say
from qat_plugin.runs.ladder import Ladder
from qat_plugin.runs.language_model import language_subject
from qat_plugin.runs.low_bits import switched
from qat_plugin.runs.merging import merge_run
from qat_plugin.runs.planning import beyond_positions, planned
from qat_plugin.runs.ptq_ladder import PtqLadder
from qat_plugin.runs.quantized_file import evaluate_file, quantized_place
from qat_plugin.runs.skeleton import planned_shape, skeleton_of
from qat_plugin.runs.subject import Subject, network_of
from qat_plugin.runs.training import accelerator_of

MISTAKE: Final = 2
_NOTHING: Final = "nothing quantized"
_PRODUCTS: Final = {
    "report.md": "report", POLICY: "policy", "sensitivity.md": "sensitivity", ADAPTER: "adapter",
    MERGED: "merged model", CONVERTED: "converted model",
    EXPORTED: "exported",
}  # fmt: skip


def run_job(job: Job, given: Sequence[str]) -> int:
    """Run one composed job.

    Args:
        job: the config and where it comes from.
        given: the command line, to be recorded.

    Returns:
        The exit code. A mistake of the user's is told on stderr; a bug raises.
    """
    config = job.config
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    try:
        match config.task.name:
            case "doctor":
                print(examination())
            case "plan":
                with journal(None, verbose=config.verbose):
                    return _plan(job, given)
            case "merge":
                with journal(None, verbose=config.verbose):
                    merge_run(job)
            case "export":
                with journal(None, verbose=config.verbose):
                    export_run(job)
            case "evaluate":
                with journal(None, verbose=config.verbose):
                    evaluate(job)
            case _:
                return climb(job, shlex.join(["qat", *given]))
    except QatError as error:
        print(f"qat: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def _plan(job: Job, given: Sequence[str]) -> int:
    """Print what becomes of each layer and, for adapters, what training will take.

    Returns:
        0, or 3 when the run would not fit the card that the recipe is for.
    """
    config = job.config
    choose_card(config.plan, [key.partition("=")[0] for key in given])
    job, switch = switched(job)
    config, plan = job.config, planned(job)
    if switch:
        print(f"{switch}\n")
    if config.plan.shape is not None:
        shape = planned_shape(config)
        print(f"planned for the shape {shape}\n" if shape else f"planned for {config.model.path}, not plan.shape\n")
    if config.policy.auto.enabled:
        print(bounds(config, choices_in(config, skeleton_of(config, job.allow))))
        return 0
    print(plan)
    if option_of(config, "model") == "custom":
        return 0
    network = skeleton_of(config, job.allow)
    if warning := beyond_positions(config, network):
        print(f"\n{warning}")
    if not trains_adapters(config):
        return 0
    text, fits = forecast_run(config, network, plan)
    print(f"\n{text}")
    return 0 if fits else WILL_NOT_FIT


def evaluate(job: Job) -> None:
    """Measure the converted model of a run's folder beside its float model, or a model (a quantized file) as it is."""
    config = job.config
    if config.run.dir is None and (place := quantized_place(config)) is not None:
        evaluate_file(config, place)
        return
    if job.recipe is None and config.run.dir is None:
        raise ConfigError(
            "task=evaluate needs to know what to measure: run=DIR (the converted model of a run's folder), "
            "recipe=NAME (its model as it is) or model.path=FILE (a quantized file or folder)"
        )
    if trains_adapters(config):
        check_extra(config.lora.backend)
    subject = subject_of(job)
    network = network_of(subject.build()).eval()
    rows = [Row(reporting.FLOAT, subject.evaluate(network, None), model_bytes(network))]
    folder = Path(config.run.dir or "").expanduser() / CONVERTED
    if config.run.dir is not None and trains_adapters(config):
        adapted = adapt(config, subject.build_base())
        qlora.load_adapter(adapted, folder.parent / ADAPTER)
        rows.append(Row(reporting.QLORA, subject.evaluate(adapted.eval(), network), model_bytes(adapted)))
    if config.run.dir is not None and (folder.exists() or not trains_adapters(config)):
        small = load_converted(network_of(subject.build()).eval(), folder)
        rows.append(Row(reporting.RELOADED, subject.evaluate(small, network), model_bytes(small), file_bytes(folder)))
    report = Report(_title(config), rows=tuple(rows), parameters=parameter_count(network))
    reporting.print_report(report)


def subject_of(job: Job) -> Subject:
    """The model and the data that a recipe names, loaded or built."""
    L.seed_everything(job.config.trainer.seed, workers=True, verbose=False)
    subjects = {"custom": custom_subject, "image": image_subject}
    return subjects.get(option_of(job.config, "model"), language_subject)(job.config, job.allow)


def climb(job: Job, command: str) -> int:
    """Climb the ladder in the run's folder, from where it was left.

    Returns:
        0, or 130 when it was interrupted; then the folder can be resumed.
    """
    job, switch = switched(job)
    config = job.config
    if job.recipe is None:
        names = ", ".join(entry.name for entry in recipes())
        raise ConfigError(f"task={config.task.name} needs a recipe: recipe=NAME, with NAME one of {names}")
    check_options(config)
    plan = planned(job)  # what is wrong with the recipe shows before anything is written
    folder = open_folder(config, command, default=job.folder, allow=job.allow)
    interruptions = Interruptions(f"qat: stopped at once. Go on with: {folder.resume_command}")
    with journal(folder.path / "log", verbose=config.verbose):
        say(f"{_title(config)}\nfolder: {folder.shown}")
        if switch:
            say(switch)
        try:
            with interruptions.listening():
                report = _climbed(job, plan, folder, interruptions)
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt)) or interruptions.received > 0
            folder.record.status = "interrupted" if stopped else "failed"
            folder.save()
            if not stopped:
                if isinstance(error, QatError) and config.run.dir is None:
                    folder.discard()
                raise
            where = str(error) if isinstance(error, Interrupted) else "stopped; finished stages are kept"
            print(f"qat: {where}. Go on with: {folder.resume_command}", file=sys.stderr)
            return EXIT_CODE
        folder.finish()
        if report is not None:
            reporting.print_report(report)
        made = [f"{what}: {folder.shown}/{name}" for name, what in _PRODUCTS.items() if (folder.path / name).exists()]
        say("\n" + "   ".join(made))
    return 0


def _climbed(job: Job, plan: Plan, folder: RunFolder, interruptions: Interruptions) -> Report | None:
    config, record = job.config, folder.record
    subject = subject_of(job)
    if record.data_fingerprint and record.data_fingerprint != subject.fingerprint:
        raise ConfigError(
            f"the data has changed since this run began (fingerprint {record.data_fingerprint[:12]}, now "
            f"{subject.fingerprint[:12]}): its stages would not be comparable; start again in another run.dir"
        )
    record.data_fingerprint = subject.fingerprint
    if option_of(config, "model") != "custom" and (warning := beyond_positions(config, skeleton_of(config, job.allow))):
        say(warning)
    adapters = trains_adapters(config)
    if config.task.name == "sensitivity":
        rank(config, subject, folder)
        return None
    if not adapters:
        auto = config.policy.auto.enabled
        policy = chosen_policy(config, subject, folder) if auto else policy_of(config.policy)
        plan = policy.plan(network_of(subject.build()))
    agreed = plan
    if not adapters and not folder.continued and config.ptq.method != LADDER:  # which finds a plan of its own
        check_before(config, subject, agreed)
    say(f"{agreed.summary()}\n")
    earlier = folder.path / REPORT_JSON
    report = reporting.read_report(earlier) if folder.continued and earlier.is_file() else _begun(job, folder, agreed)
    ladder = AdapterLadder if adapters else PtqLadder if config.ptq.method == LADDER else Ladder
    return ladder(config, subject, agreed, folder, interruptions, report).climb()


def _begun(job: Job, folder: RunFolder, agreed: Plan) -> Report:
    return Report(
        _title(job.config),
        recipe=job.config.name or "",
        command=folder.record.command,
        plan=tuple(agreed.to_list()),
        environment=reporting.environment(accelerator_of(job.config.trainer)),
    )


def _title(config: Config) -> str:
    policy = _policy_in_short(config)
    adapters = trains_adapters(config) and config.task.name == "fit"
    done = f"adapters on {policy or 'a float base'}" if adapters else f"{config.task.name}, {policy or _NOTHING}"
    return f"{config.name or 'a model'}: {done}"


def _policy_in_short(config: Config) -> str:
    policy = config.policy
    if config.task.name == "sensitivity":
        return ", ".join(policy.auto.candidates)
    if policy.auto.enabled:
        return f"auto, budget={config.budget}" if config.budget is not None else f"auto, max_drop={config.max_drop}"
    rules = [f"{pattern} {scheme or 'kept'}" for pattern, scheme in policy.rules.items()]
    return ", ".join([*rules, *([policy.default] if policy.default else [])])
