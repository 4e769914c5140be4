"""
Before a run: what it will take, and whether this machine has it: python -m tools.preflight

Prints one line with the time, disk and memory of a whole run (params.yaml: estimate). What is missing is listed, all
of it at once, each with what to do, and the exit code is 1: nothing has been started by then.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stages.adapter_format import misfits
from stages.engine import Engine, with_arm
from stages.finetune import Lora
from stages.images import architecture, engines, rebuild
from stages.machine import memory_gib
from stages.stage import UserError, gpus, load_yaml, read_params, results, run


@dataclass
class Estimate:
    minutes: int
    disk_gb: float
    memory_gb: float
    gpu_memory_gb: float


def missing_resources(p, free_disk_gb, machine_memory_gib, cards):
    """What the machine lacks for the estimate `p`, as sentences that say what to do; cards: what stage.gpus() gives."""
    missing = []
    if free_disk_gb < p.disk_gb:
        missing.append(
            f"disk: {free_disk_gb:.1f} GB are free here, {p.disk_gb:g} GB are needed; free some or move the clone"
        )
    if machine_memory_gib * 1.074 < p.memory_gb:
        missing.append(
            f"memory: this machine has {machine_memory_gib} GiB, {p.memory_gb:g} GB are needed; "
            "a smaller finetune.micro_batch in params.yaml takes less"
        )
    # A GPU that shares the machine's memory has no figure of its own, and is held to the line above.
    largest = max(((card["memory_mib"] or machine_memory_gib * 1024) * 2**20 / 1e9 for card in cards), default=0)
    if p.gpu_memory_gb and not cards:
        missing.append("GPU: nvidia-smi finds none; `make reproduce PROFILE=embedded` needs none")
    elif largest < p.gpu_memory_gb:
        missing.append(f"GPU: the largest has {largest:.0f} GB, {p.gpu_memory_gb:g} GB are needed")
    return missing


def missing_images(images, docker_answers):
    """What stands between this machine and the images in use; docker_answers: the engine can be reached."""
    missing = []
    references = sorted({image.split("+")[0] for image in images.values() if image.startswith("docker://")})
    if references and not docker_answers:
        missing.append("Docker: no engine answers; install Docker with the NVIDIA container toolkit and start it")
    for reference in references:
        if reference.endswith("UNRESOLVED"):
            missing.append(f"image: {reference.removeprefix('docker://')} has no digest yet; `make lock` resolves it")
    return missing


def misfit_engine(p, lora, gpu_count):
    """Why TensorRT-LLM's engine could not serve the adapters, or not be built: said before hours of training."""
    if p.route == "none":
        return []
    found = []
    for variant in p.variants:
        one = with_arm(p, variant)
        reasons = misfits(lora.target_modules, lora.r, one.lora_target_modules, one.max_lora_rank)
        found += [f"engine {variant}: the adapters do not fit: {reason}" for reason in reasons]
        if gpu_count and one.tp_size > gpu_count:
            found.append(f"engine {variant}: engine.tp_size is {one.tp_size}, this machine has {gpu_count} GPUs")
    return found


def to_rebuild(image):
    """The engines that are there and do not fit this machine, a line each; DVC builds them anew."""
    gpu = architecture()
    lines = [(variant, rebuild(engine, gpu, image)) for variant, engine in engines().items()]
    return [f"engine {variant}: {line}" for variant, line in lines if line]


def docker_answers():
    """True when a Docker engine can be reached."""
    return (
        shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


def main():
    p = read_params(Estimate)
    profile = load_yaml("params.yaml")["profile"]
    images = load_yaml("containers/images.yaml")["images"]
    missing = missing_images(images, docker_answers())
    cards = gpus()
    missing += misfit_engine(read_params(Engine), read_params(Lora), len(cards))
    # Once a whole run stands here, its environments and results do too: a re-run takes little more room.
    disk = Estimate(**{**p.__dict__, "disk_gb": 1.0}) if (results("report") / "index.html").exists() else p
    free = shutil.disk_usage(".").free / 1e9
    missing += missing_resources(disk, free, memory_gib(Path("/proc/meminfo").read_text()), cards)
    if missing:
        raise UserError(f"profile {profile} cannot run here:\n  " + "\n  ".join(missing))
    for line in to_rebuild(images["triton"]):
        print(line)
    gpu = f", {p.gpu_memory_gb:g} GB on the GPU" if p.gpu_memory_gb else ""
    print(
        f"profile {profile}: a whole run takes about {p.minutes} min, {p.disk_gb:g} GB of disk and "
        f"{p.memory_gb:g} GB of memory{gpu}; what is up to date is skipped",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
