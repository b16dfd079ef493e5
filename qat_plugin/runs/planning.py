"""What can be known, and what can be known to be wrong, before a weight is read or a file is written."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qat_plugin.callbacks import Schedule
from qat_plugin.config.fields import is_hub_name
from qat_plugin.config.launch import Job
from qat_plugin.config.options import (
    EmbeddedText,
    IdxFolder,
    ImageModel,
    Images,
    InstructionFiles,
    TextFiles,
    TransformersModel,
)
from qat_plugin.config.schema import FINE_TUNED, Config
from qat_plugin.config.targets import is_target
from qat_plugin.config.typed import option_of
from qat_plugin.errors import ConfigError, did_you_mean
from qat_plugin.exporting.reading import is_gguf
from qat_plugin.policy import Plan
from qat_plugin.qlora.adapters import AdapterOptions, target_layers
from qat_plugin.qlora.extra import check_extra
from qat_plugin.qlora.prepare import base_plan
from qat_plugin.runs.base_policy import base_policy, check_scheme, policy_of, trains_adapters
from qat_plugin.runs.choosing import choices_in
from qat_plugin.runs.skeleton import skeleton_of
from qat_plugin.runs.training import accelerator_of
from qat_plugin.scheme import Scheme
from qat_plugin.sensitivity import MaxDrop


def planned(job: Job) -> Plan:
    """The recipe's policy resolved against its model's architecture; all of the recipe is checked on the way.

    Of a policy that is yet to be found, and of a ranking, it is the plan of the first candidate.

    Raises:
        ConfigError: for options that do not go together, a path that does not exist, a schedule that is none.
        PolicyError: when the policy does not fit the model.
    """
    config = job.config
    if config.lora.enabled != ("qlora" in config.task.stages) and config.task.stages:
        raise ConfigError(
            "adapters are trained by a run with the stage 'qlora': lora=default and task=qlora go together, and "
            f"lora=none with the other stages; this recipe has lora.enabled="
            f"{str(config.lora.enabled).lower()} and the stages {', '.join(config.task.stages)}"
        )
    device = accelerator_of(config.trainer)
    check_choices(config)
    if trains_adapters(config) and config.task.name != "plan":
        check_extra(config.lora.backend)
    if trains_adapters(config) and (config.policy.auto.enabled or config.task.name == "sensitivity"):
        raise ConfigError(
            "policy=auto and task=sensitivity measure fake quantization, not the base of adapters: use lora=none"
        )
    if trains_adapters(config):
        return _planned_base(config, skeleton_of(config, job.allow))
    if "qat" in config.task.stages:
        Schedule(config.qat.start, config.qat.freeze).resolve(config.trainer.max_steps)
    if config.policy.auto.enabled or config.task.name == "sensitivity":
        return next(iter(choices_in(config, skeleton_of(config, job.allow)).plans.values()))
    if config.max_drop is not None:
        MaxDrop.parse(config.max_drop)
    policy = policy_of(config.policy)
    return policy.plan(skeleton_of(config, job.allow), device=device)


def _planned_base(config: Config, network: nn.Module) -> Plan:
    """The plan of the adapters' base; the adapters' options are checked on the way."""
    plan, lora = base_plan(network, base_policy(config)), adapter_options(config)
    target_layers(network, lora.targets)
    check_merge_schemes(config)
    integer = any(layer.scheme is not None and layer.scheme.is_integer for layer in plan)
    if config.distill.weight and not integer:
        raise ConfigError(
            "distill.weight learns from the float model, which a run on an NF4 base does not hold: use it with an "
            "integer policy (policy=int4), or set distill.weight=0"
        )
    unused = {
        "qat.scale_learning_rate": config.qat.scale_learning_rate is not None,
        "qat.learn_zero_points": config.qat.learn_zero_points,
        "qat.monitor": config.qat.monitor is not False,
        "qat.initial=gptq": config.qat.initial == "gptq",
        "qat.begin=fine-tuned": config.qat.begin == FINE_TUNED,
        "distill.teacher=fine-tuned": config.distill.teacher == "fine-tuned",
    }
    if named := [key for key, given in unused.items() if given]:
        raise ConfigError(f"{', '.join(named)}: not for adapters (lora=...), only for training all weights")
    if integer and config.merge.scheme:
        raise ConfigError(
            f"the policy makes this base fake-quantized, and it is converted to the policy's schemes; the recipe's "
            f"merge.scheme={config.merge.scheme} is for an NF4 base: set merge.scheme=null"
        )
    if not integer and "converted" in config.task.stages and config.merge.scheme is None:
        raise ConfigError("the stage 'converted' needs merge.scheme=SCHEME, what the merged model is to become")
    if config.merge.scheme and Scheme.parse(config.merge.scheme).kind == "nf4":
        raise ConfigError(
            f"merge.scheme={config.merge.scheme}: quantizing merged weights into NF4 again erases small updates. Keep "
            "the adapter beside its base, or give an integer scheme"
        )
    return plan


def check_merge_schemes(config: Config) -> None:
    """Raise ConfigError for a misspelt scheme among what a merge is converted to or compared with."""
    check_scheme("merge.scheme", config.merge.scheme)
    for scheme in config.merge.compare:
        check_scheme("merge.compare", scheme)


def beyond_positions(config: Config, network: nn.Module) -> str:
    """A warning where windows are longer than the model has positions; empty where they are not."""
    positions = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    length = getattr(config.data, "sequence_length", 0)
    if not isinstance(positions, int) or length <= positions:
        return ""
    return (
        f"warning: data.sequence_length={length} is more than the model's {positions} positions "
        f"(max_position_embeddings), beyond which it has learned nothing: set data.sequence_length={positions}"
    )


def adapter_options(config: Config) -> AdapterOptions:
    """The adapters of a recipe.

    Raises:
        ConfigError: for an option that is not allowed.
    """
    lora = config.lora
    targets = lora.targets if isinstance(lora.targets, str) else tuple(map(str, lora.targets))
    return AdapterOptions(lora.rank, lora.alpha, lora.dropout, targets, lora.rslora, lora.dora, lora.init)


def check_choices(config: Config) -> None:
    """Raise for options that do not go together and paths that do not exist.

    Raises:
        ConfigError: with what to choose instead, or the closest name beside a path.
    """
    if option_of(config, "model") == "custom":
        if not is_target(config.data):
            raise ConfigError("model=custom needs data=custom: your LightningDataModule, data._target_=package.Class")
        return
    if isinstance(config.model, ImageModel):
        _check_image_choices(config)
        return
    if isinstance(config.data, Images):
        raise ConfigError(f"data={config.data.kind} holds images, for model=image; a language model learns from text")
    if option_of(config, "optimizer") == "own":
        raise ConfigError("optimizer=own is for model=custom: a language model that qat loads has none of its own")
    if not isinstance(config.data, (EmbeddedText, InstructionFiles, TextFiles)):
        raise ConfigError("data=custom is for model=custom; with a language model use data=text or data=embedded")
    if not config.data.kind == "embedded" and not config.data.train and config.task.name not in ("plan", "merge"):
        raise ConfigError("data.train is needed: the file to learn from; give data.train=FILE")
    if isinstance(config.model, TransformersModel) and not is_hub_name(config.model.path):
        _check_path("model.path", config.model.path)
        if Path(config.model.path).is_file() and not is_gguf(Path(config.model.path)):
            raise ConfigError(
                f"model.path={config.model.path} is a file, and not a GGUF one: give the directory with config.json, "
                "weights and tokenizer"
            )
    if isinstance(config.data, (InstructionFiles, TextFiles)):
        _check_path("data.train", config.data.train)
        _check_path("data.valid", config.data.valid)


def _check_image_choices(config: Config) -> None:
    if not isinstance(config.data, Images):
        raise ConfigError("model=image needs images: data=digits, or data=idx data.path=DIR")
    if option_of(config, "optimizer") == "own":
        raise ConfigError("optimizer=own is for model=custom: the image net that qat brings has none of its own")
    if config.lora.enabled or config.distill.weight:
        raise ConfigError("adapters (lora) and distillation (distill.weight) are for language models, not model=image")
    if isinstance(config.data, IdxFolder):
        _check_path("data.path", config.data.path)


def _check_path(key: str, given: str | None) -> None:
    if not given or (path := Path(given)).exists():
        return
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, beside, cutoff=0.7)
    where = "" if path.parent.is_dir() else f"; nor does the folder {path.parent}"
    raise ConfigError(f"{key}={given} does not exist{where}.{near}")
