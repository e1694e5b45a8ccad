"""Peak compute of known devices, for model FLOPs utilisation."""

from __future__ import annotations

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) tensor-core TFLOP/s from the data sheets; the first that a device's name holds."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device by the name torch gives it; None for one that is not in the table, never a guess."""
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if name in device_name)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12
