"""What the NVIDIA driver says about a GPU, through NVML (package nvidia-ml-py)."""

from __future__ import annotations

import contextlib
from typing import Any

import pynvml


class GpuMonitor:
    """Reads one GPU. Where there is no GPU, driver or permission, readings are missing, never an error."""

    def __init__(self, uuid: str | None) -> None:
        """Watch the GPU with this UUID ("GPU-..."); None watches nothing.

        The UUID is the one name that torch and NVML share: NVML ignores CUDA_VISIBLE_DEVICES.
        """
        self._handle: Any = None
        if uuid is None:
            return
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> dict[str, float]:
        """utilisation and memory_utilisation (percent), memory_gib, power_watts, temperature_celsius."""
        if self._handle is None:
            return {}
        readings: dict[str, float] = {}
        for read in (_read_utilisation, _read_memory, _read_power, _read_temperature):
            with contextlib.suppress(pynvml.NVMLError):  # MIG slices and some boards lack a reading
                readings |= read(self._handle)
        return readings


def current_device_uuid() -> str | None:
    """UUID of torch's current CUDA device as NVML spells it; None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def _read_utilisation(handle: Any) -> dict[str, float]:
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"utilisation": float(rates.gpu), "memory_utilisation": float(rates.memory)}


def _read_memory(handle: Any) -> dict[str, float]:
    return {"memory_gib": pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30}


def _read_power(handle: Any) -> dict[str, float]:
    return {"power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000.0}  # NVML counts milliwatts


def _read_temperature(handle: Any) -> dict[str, float]:
    celsius = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    return {"temperature_celsius": float(celsius)}
