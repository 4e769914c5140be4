"""
The memory of this process while it trains: its GPU memory by NVML (as `nvidia-smi` shows it, CUDA
context included), what torch allocated and reserved, and on a CPU the resident memory. All in MiB.
"""

import os
import threading

from lib.core.attempt import attempt

MIB = 2**20


class MemorySampler:
    """Samples the process's memory five times a second until the `with` block ends.

    mark(phase) closes a phase: the peak since the last mark is that phase's peak, and the highest of them the run's.
    What comes after the last mark (writing the adapter) is in neither.
    """

    INTERVAL_SECONDS = 0.2

    def __init__(self):
        self.phases, self.phase_peak = {}, 0.0
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.read = gpu_reader() or resident_mib
        self.on_gpu = self.read is not resident_mib

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stop.set()
        self.thread.join()

    def sample(self):
        while not self.stop.wait(self.INTERVAL_SECONDS):
            self.note(self.read())

    def note(self, mib):
        with self.lock:
            self.phase_peak = max(self.phase_peak, mib or 0.0)

    def mark(self, phase):
        """End the phase `phase`; one that comes again (a step, an evaluation) keeps its highest peak."""
        self.note(self.read())
        with self.lock:
            peak, self.phase_peak = self.phase_peak, 0.0
        entry = {"process_peak_mib": peak or None, **torch_peaks(reset=True)}
        old = self.phases.get(phase, {})
        self.phases[phase] = {key: max(value or 0, old.get(key) or 0) or None for key, value in entry.items()}

    def summary(self):
        """{device, process_peak_mib, torch_allocated_peak_mib, torch_reserved_peak_mib, phases}; None: not measured."""
        peaks = {
            key: max((phase[key] for phase in self.phases.values() if phase[key]), default=None)
            for key in ("process_peak_mib", "torch_allocated_peak_mib", "torch_reserved_peak_mib")
        }
        device = "gpu process (NVML)" if self.on_gpu else "resident (CPU)"
        return {"device": device, **peaks, "phases": self.phases}


def gpu_reader():
    """A function that reads this process's memory on its current GPU in MiB, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    import pynvml

    attempt(pynvml.nvmlInit)
    # By its name: NVML counts every GPU of the machine, torch only those in CUDA_VISIBLE_DEVICES.
    handle = attempt(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{torch.cuda.get_device_properties().uuid}")

    def read():
        processes = attempt(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        mine = [process for process in processes if process.pid == os.getpid()]
        # Inside a container the driver knows the process by another number: alone on the GPU it is the only one.
        if not mine and len(processes) == 1:
            mine = processes
        return mine[0].usedGpuMemory / MIB if mine and mine[0].usedGpuMemory else None

    return read


def resident_mib():
    """Resident memory of this process, in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / MIB


def torch_peaks(reset):
    """Peaks of torch's CUDA allocator since the last reset, in MiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"torch_allocated_peak_mib": None, "torch_reserved_peak_mib": None}
    peaks = {
        "torch_allocated_peak_mib": torch.cuda.max_memory_allocated() / MIB,
        "torch_reserved_peak_mib": torch.cuda.max_memory_reserved() / MIB,
    }
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peaks
