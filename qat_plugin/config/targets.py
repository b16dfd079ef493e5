"""``_target_``: the user's own classes, behind an allow-list.

A recipe is data that people pass around, and a name in it must not become a call of whatever Python can import. So a
target has to pass four gates: its spelling begins with an allowed package; what it names is a class; that class's own
qualified name begins with an allowed package too (``torch.os.system`` and ``torch.serialization.pickle.Unpickler`` do
not); and it is of the kind that its place in the recipe is for. Packages beyond the defaults are allowed on the command
line (``allow=[my_package]``) or by the environment variable ``QAT_ALLOW``, never by a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qat_plugin.config.arguments import ALLOW_VARIABLE
from qat_plugin.errors import ConfigError, did_you_mean

ALLOWED: Final = (
    "torch",
    "torchvision",
    "torchao",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "timm",
    "qat_plugin",
)
TARGET: Final = "_target_"


def is_target(value: object) -> bool:
    """Whether a config value names a class to instantiate."""
    return isinstance(value, Mapping) and TARGET in value


def resolve(path: object, kinds: tuple[type, ...], *, allow: Sequence[str] = (), where: str = TARGET) -> type:
    """The class that a target names.

    Args:
        path: dotted name, ``package.module.Class``.
        kinds: base classes, one of which it must derive from.
        allow: packages allowed beside the defaults.
        where: the key it stands at, for messages.

    Raises:
        ConfigError: when it fails one of the gates.
    """
    if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
        raise ConfigError(
            f"{where}={path} is not allowed: a target is the dotted name of a class, package.module.Class"
        )
    _check_prefix(path, path, allow, where)
    found = _walk(path, where)
    if not inspect.isclass(found):
        raise ConfigError(
            f"{where}={path} is not allowed: it names a {type(found).__name__}, and only classes are instantiated"
        )
    _check_prefix(f"{found.__module__}.{found.__qualname__}", path, allow, where)
    if not issubclass(found, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{where}={path} is not allowed: it must derive from {names}")
    return found


def instantiate(
    spec: Mapping[str, Any],
    kinds: tuple[type, ...],
    *,
    nested: tuple[type, ...],
    allow: Sequence[str] = (),
    where: str,
    first: tuple[Any, ...] = (),
) -> Any:
    """Build what a mapping with ``_target_`` describes: its other keys are the arguments, by keyword.

    Args:
        spec: the mapping; values that are such mappings themselves are built first.
        kinds: base classes of the target.
        nested: base classes of targets among the arguments.
        allow: packages allowed beside the defaults.
        where: the key the mapping stands at, for messages.
        first: positional arguments before the others (an optimizer's parameters).

    Raises:
        ConfigError: when a target is not allowed or does not take these arguments. What a constructor itself raises is
            the user's own and passes.
    """
    target = resolve(spec[TARGET], kinds, allow=allow, where=f"{where}.{TARGET}")
    if reserved := [key for key in spec if key.startswith("_") and key != TARGET]:
        raise ConfigError(
            f"{where}.{reserved[0]} is not supported: beside {TARGET} there are only arguments, by keyword"
        )

    def build(key: str, value: Any) -> Any:
        if is_target(value):
            return instantiate(value, nested, nested=nested, allow=allow, where=key)
        if isinstance(value, list):
            return [build(f"{key}.{index}", item) for index, item in enumerate(value)]
        return value

    arguments = {key: build(f"{where}.{key}", value) for key, value in spec.items() if key != TARGET}
    _check_arguments(target, first, arguments, where)
    return target(*first, **arguments)


def _check_prefix(name: str, path: str, allow: Sequence[str], where: str) -> None:
    allowed = (*ALLOWED, *allow)
    if any(name.startswith(f"{prefix}.") for prefix in allowed):
        return
    package = name.partition(".")[0]
    really = "" if name == path else f", which is really {name}"
    raise ConfigError(
        f"{where}={path}{really} is not allowed: targets come from {', '.join(allowed)}. If you trust {package!r} and "
        f"this recipe, say so on the command line, allow=[{package}], or set {ALLOW_VARIABLE}={package}"
    )


def _walk(path: str, where: str) -> Any:
    """The object at a dotted name: attributes first, submodules where there is no such attribute."""
    parts = path.split(".")
    found = _import(parts[0], path, where)
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and inspect.ismodule(found):
            _import(".".join(parts[:index]), path, where)
        if not hasattr(found, part):
            raise ConfigError(
                f"{where}={path}: {'.'.join(parts[: index - 1])} has no {part!r}.{did_you_mean(part, dir(found))}"
            )
        found = getattr(found, part)
    return found


def _import(module: str, path: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the user's module exists and itself imports something that is missing
        parent, _, missing = module.rpartition(".")
        if parent:
            return None  # the caller finds that there is no such attribute either
        raise ConfigError(
            f"{where}={path}: there is no package {missing!r} here; install it, or run qat from the folder it lies in"
        ) from error


def _check_arguments(target: type, first: tuple[Any, ...], arguments: Mapping[str, Any], where: str) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a class written in C may have none; its constructor will tell
        return
    try:
        signature.bind(*first, **arguments)
    except TypeError as error:
        known = list(signature.parameters)[len(first) :]
        raise ConfigError(
            f"{where}: {target.__name__} does not take these arguments: {error}; it takes {', '.join(known) or 'none'}"
        ) from error
