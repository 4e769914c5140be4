"""What NVML says of the GPUs while a load runs, with a double in the place of its library."""

from types import SimpleNamespace

import pytest

from lib.core.gpu import gpu_sample, other_gpu_processes
from lib.serving.monitor import Monitor, gpu_summary


class NVMLError(Exception):
    pass


def refused(*_):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A machine with two GPUs at 650 and 640 W; its answers can be changed."""
    library = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetPowerUsage=lambda handle: 650_000 - 10_000 * handle,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetTemperature=lambda handle, kind: 60 + handle,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=4711)] if handle == 1 else [],
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


def test_the_watts_of_all_gpus_add_up_and_the_hottest_counts(nvml):
    found = gpu_summary([[gpu_sample(0), gpu_sample(1)]] * 2)
    assert found == {"gpu_watts": 1290.0, "gpu_sm_mhz": 1980, "gpu_celsius_max": 61, "gpu_slowed": [], "gpu_capped": 0}


@pytest.mark.parametrize(
    ("bits", "slowed", "capped"),
    [
        (0x4, [], 1.0),  # its own power limit belongs to a card
        (0x8, ["hardware slowdown"], 0.0),
        (0x20, ["software thermal slowdown"], 0.0),
        (0x40 | 0x80, ["hardware power brake", "hardware thermal slowdown"], 0.0),
        (0x1, [], 0.0),  # idle
    ],
)
def test_a_card_that_was_slowed_says_by_what(nvml, bits, slowed, capped):
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: bits
    found = gpu_summary([[gpu_sample(0)]])
    assert (found["gpu_slowed"], found["gpu_capped"]) == (slowed, capped)


def test_what_a_card_does_not_tell_is_none_and_no_zero(nvml):
    for name in ("PowerUsage", "ClockInfo", "Temperature", "CurrentClocksThrottleReasons"):
        setattr(nvml, f"nvmlDeviceGet{name}", refused)
    assert set(gpu_sample(0).values()) == {None}
    assert set(gpu_summary([[gpu_sample(0)]]).values()) == {None}


def test_other_gpu_processes_are_found_on_used_gpus_only(nvml, monkeypatch):
    monkeypatch.setattr("lib.core.gpu.LEAVE_SECONDS", 0)
    assert other_gpu_processes() == [4711]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert other_gpu_processes() == []
    nvml.nvmlDeviceGetComputeRunningProcesses = refused
    assert other_gpu_processes() is None


def test_workers_of_a_stopped_server_are_not_other_processes(nvml):
    leaving = [[SimpleNamespace(pid=26809)], []]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: leaving.pop(0) if leaving else []
    assert other_gpu_processes() == []


def test_a_driver_that_does_not_answer_is_no_gpu(nvml):
    nvml.nvmlInit = refused
    assert other_gpu_processes() is None
    assert Monitor(SimpleNamespace(gauges={}), list).gpus == []
