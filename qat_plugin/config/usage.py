"""What ``qat`` and ``qat --help`` print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qat_plugin.config.catalogue import groups, recipes
from qat_plugin.config.keys import keys_with_help
from qat_plugin.config.options import (
    AdamW,
    Digits,
    EmbeddedModel,
    EmbeddedText,
    IdxFolder,
    ImageModel,
    InstructionFiles,
    TextFiles,
    TransformersModel,
)
from qat_plugin.config.schema import Config

_OPTIONS = {
    "model=embedded": ("model.", EmbeddedModel),
    "model=transformers": ("model.", TransformersModel),
    "model=image": ("model.", ImageModel),
    "data=embedded": ("data.", EmbeddedText),
    "data=text": ("data.", TextFiles),
    "data=instructions": ("data.", InstructionFiles),
    "data=digits": ("data.", Digits),
    "data=idx": ("data.", IdxFolder),
    "optimizer=adamw": ("optimizer.", AdamW),
}

_EXAMPLES = """\
Examples
  qat                                                     list the recipes
  qat recipe=qat_int4_tiny                                run one
  qat recipe=qat_int4_tiny trainer.max_steps=300          change a key
  qat recipe=qat_mixed_tiny policy.rules.ffn=w4a8-g32     change the scheme of a role or pattern
  qat recipe=qat_int4_tiny task=plan                      show the plan, train nothing
  qat recipe=qat_int4_llama model.path=DIR data.train=FILE data.valid=FILE
  qat -m recipe=ptq_tiny policy=int8,int4,mixed           sweep
  qat --config-dir mine recipe=my70b                      your own recipes, in the folder mine/
  qat recipe=ptq_tiny policy=auto budget=4.6bpw           schemes chosen by measuring (or budget=40%, 25MB)
  qat recipe=qat_int4_tiny task=sensitivity               which layers suffer from which scheme
  qat task=plan recipe=qlora_70b_one_gpu plan.gpu_gib=48  will it fit, and what to change if not
  qat task=merge run=DIR                                  fold a run's adapter into its base
  qat recipe=qat_mixed_tiny export=gguf                   and a file for llama.cpp at the end
  qat task=export run=DIR format=onnx                     the converted model of a run, for another runtime
  qat task=export model.path=x.gguf format=torchao        the integers of a quantized file, in another format
  qat task=evaluate model.path=x.gguf                     measure such a file; recipes train its float numbers
  qat resume=DIR                                          go on with a run that was stopped
  qat task=evaluate run=DIR                               measure a run's converted model again
  qat task=doctor                                         what this machine can do

Exit codes: 0 done, 2 a mistake in what was given, 3 a plan whose run will not fit,
            130 stopped by Ctrl-C (resumable), 141 nobody reads the output, 1 a bug (with its traceback).
A class of your own in _target_ needs its package allowed: allow=[my_package], or QAT_ALLOW=my_package.
Also: --config-dir FOLDER, -m, --cfg job (show the composed recipe), --version, --hydra-help, --shell-completion."""


def listing(folders: Sequence[Path] = ()) -> str:
    """The recipes with one line each."""
    rows = [(entry.name, entry.summary) for entry in recipes(folders)]
    return "\n".join(["Recipes (run one: qat recipe=NAME; change it: key=value; more: qat --help)", *_columns(rows)])


def help_text(folders: Sequence[Path] = ()) -> str:
    """Recipes, groups and their options, every key with its default and meaning, examples."""
    parts = ["qat: quantization-aware training, conversion and proof by recipe.", "", listing(folders), ""]
    for group, options in groups().items():
        if group == "scheme":
            names = ", ".join(option.name for option in options)
            parts += [
                "Schemes (policy.default=NAME, policy.rules.ROLE=NAME, scheme@policy.rules.ROLE=NAME)",
                f"  {names}",
                "  nf4 and nf4-dq are for the frozen base of adapters (lora=default), the others for all",
                "",
            ]
        else:
            parts += [f"{group}=", *_columns((option.name, option.summary) for option in options), ""]
    parts += ["Keys", *_columns(_keys(Config))]
    for choice, (prefix, section) in _OPTIONS.items():
        parts += [f"  with {choice}:", *_columns(_keys(section, prefix), indent=4)]
    return "\n".join([*parts, "", _EXAMPLES])


def _keys(section: type, prefix: str = "") -> list[tuple[str, str]]:
    fixed = ("kind", "model", "data", "optimizer", "task.name", "task.stages")
    return [
        (f"{key}={default}", help)
        for key, default, help in keys_with_help(section, prefix)
        if key.removeprefix(prefix) not in fixed
    ]


def _columns(rows: Iterable[tuple[str, str]], indent: int = 2) -> list[str]:
    rows = list(rows)
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{' ' * indent}{left.ljust(width)}  {right}".rstrip() for left, right in rows]
