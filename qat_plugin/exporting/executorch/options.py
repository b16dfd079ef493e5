"""What can be set of an ExecuTorch export."""

from __future__ import annotations

from dataclasses import dataclass, field

from qat_plugin.errors import ConfigError

_CONTEXT = 512


@dataclass(frozen=True)
class Options:
    """Of one ``.pte`` file.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    max_length: int = field(
        default=0,
        metadata={"help": "longest sequence of a language model, in tokens; 0: 512, or what it takes at most"},
    )
    max_batch: int = field(
        default=0, metadata={"help": "most rows of one call; 0: 1 of a language model, otherwise those of the sample"}
    )

    def __post_init__(self) -> None:
        if self.max_length < 0 or self.max_batch < 0:
            raise ConfigError(f"max_length ({self.max_length}) and max_batch ({self.max_batch}) are not below 0")

    def length(self, most: int | None) -> int:
        """The longest sequence, where a model takes ``most`` tokens."""
        limit = _CONTEXT if most is None else most
        return min(self.max_length or _CONTEXT, limit)
