"""Where a unit runs: the device, the precision, the CPU threads, and what they are called in a record.

`DEVICE=cpu|cuda|cuda:1|mps` chooses; otherwise CUDA, then MPS, then the CPU.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from foldwise.errors import DeviceError

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device, the precision of its forward passes and the number of its CPU threads.

    Attributes:
        device: Where tensors live.
        precision: `fp32`, `bf16` or `fp16`.
        threads: CPU threads of an operation; part of a result's bits.
    """

    device: torch.device
    precision: str
    threads: int

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type of the forward pass's arithmetic; None for plain float32."""
        return _DTYPES[self.precision]

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels last, which convolutions are faster in, but on MPS, where it has been unreliable."""
        return torch.contiguous_format if self.device.type == "mps" else torch.channels_last

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run a forward pass in this precision."""
        dtype = self.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield

    def __str__(self) -> str:
        """As a record names it, e.g. `cpu (Intel Xeon), 2 threads, bf16`."""
        return f"{self.device} ({device_name(self.device)}), {self.threads} threads, {self.precision}"


def pick_runtime(device: str | None, precision: str, threads: int | None) -> Runtime:
    """Choose where and how to run.

    Args:
        device: `cpu`, `cuda`, `cuda:<n>`, `mps`, or None for the best there is.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        threads: CPU threads, or None for torch's own choice (one a core).

    Raises:
        DeviceError: If the device asked for is not there, or cannot compute in the precision asked for.
    """
    chosen = _pick_device(device)
    if precision == "auto":
        precision = _fast_precision(chosen)
    if precision == "fp16" and chosen.type == "cpu":
        raise DeviceError(
            "`train.precision: fp16` needs a GPU, but the device is the CPU\n"
            "  fix: use `auto`, `bf16` or `fp32`: --set train.precision=auto"
        )
    return Runtime(chosen, precision, threads or torch.get_num_threads())


def _pick_device(name: str | None) -> torch.device:
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}\n  fix: DEVICE=cpu, cuda, cuda:<number> or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices\n"
            "  fix: leave DEVICE out, or see docs/TROUBLESHOOTING.md (no GPU)"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but it is not available\n  fix: leave DEVICE out, or DEVICE=cpu")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise DeviceError(f"device {name!r} is not supported\n  fix: DEVICE=cpu, cuda, cuda:<number> or mps")
    return device


def _fast_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "mps":
        return "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def device_name(device: torch.device) -> str:
    """The maker's name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(device: torch.device) -> int | None:
    """Peak memory since the process began: the GPU's on CUDA, else the process's resident set, MiB; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def make_deterministic(threads: int) -> None:
    """Make equal inputs give equal bits on equal hardware, with `threads` CPU threads an operation."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
