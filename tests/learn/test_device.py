"""A device that is not there is said in words, and a runtime is named as a record names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foldwise.errors import DeviceError
from foldwise.learn.device import Runtime, device_name, make_deterministic, peak_memory_mib, pick_runtime

STATUS = Path("/proc/self/status")


def test_the_best_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert pick_runtime(None, "fp32", 1).device.type == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "unknown device 'gpu'\n  fix: DEVICE=cpu, cuda, cuda:<number> or mps"),
        ("meta", "device 'meta' is not supported\n  fix: DEVICE=cpu, cuda, cuda:<number> or mps"),
        (
            "cuda:7",
            "device 'cuda:7' was asked for, but torch sees 1 CUDA devices\n"
            "  fix: leave DEVICE out, or see docs/TROUBLESHOOTING.md (no GPU)",
        ),
        ("mps", "device 'mps' was asked for, but it is not available\n  fix: leave DEVICE out, or DEVICE=cpu"),
    ],
)
def test_a_missing_device_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError) as caught:
        pick_runtime(name, "fp32", None)
    assert str(caught.value) == message
    assert caught.value.exit_code == 3


def test_half_precision_on_the_cpu_is_refused() -> None:
    with pytest.raises(DeviceError) as caught:
        pick_runtime("cpu", "fp16", None)
    assert str(caught.value) == (
        "`train.precision: fp16` needs a GPU, but the device is the CPU\n"
        "  fix: use `auto`, `bf16` or `fp32`: --set train.precision=auto"
    )


def test_auto_takes_the_precision_that_the_device_is_fast_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, given=capability: given)
        assert pick_runtime("cuda", "auto", 1).precision == expected
    for amx, avx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda there=amx: there)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=avx: there)
        assert pick_runtime("cpu", "auto", 1).precision == expected


def test_threads_are_given_or_torchs_own() -> None:
    torch.set_num_threads(2)
    assert pick_runtime("cpu", "fp32", None).threads == 2
    assert pick_runtime("cpu", "fp32", 3).threads == 3
    make_deterministic(1)
    assert torch.get_num_threads() == 1
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_precision(precision: str, dtype: torch.dtype) -> None:
    with Runtime(torch.device("cpu"), precision, 1).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_runtime_has_a_name() -> None:
    device = torch.device("cpu")
    assert str(Runtime(device, "bf16", 2)) == f"cpu ({device_name(device)}), 2 threads, bf16"
    assert device_name(device)


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc/self/status to compare with")
def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    mark_kib = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    assert abs(peak_memory_mib(torch.device("cpu")) - mark_kib / 1024) < 8
