"""What the numbers of a report depend on besides the code: versions, device, threads."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from qat_plugin import __version__

_PACKAGES = ("torch", "torchao", "lightning", "transformers", "numpy")


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """Names and values for ``Report.environment``; nothing that identifies the user or the host.

    Args:
        device: where the latencies were measured; its type is the entry ``"device"``, which the verdict reads.
    """
    device = torch.device(device)
    facts = {
        "device": device.type,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["python"] = platform.python_version()
    facts["qat-plugin"] = __version__
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an optional one
            facts[package] = "not installed"
    return facts


def _processor() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
