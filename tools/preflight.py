"""
Before a run, its needs and whether this machine has them: python -m tools.preflight

Prints one line with the time, disk and memory of a whole run (params.yaml: estimate). What is missing is listed, all
of it at once, each with what to do, and the exit code is 1: nothing has been started by then. Where nothing is missing,
images and models are fetched (tools/fetch.py), so that no stage downloads inside a time limit.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lib.bench.experiments import Bench
from lib.core.gpu import architecture, gpus
from lib.core.stage import UserError, load_yaml, read_params, results, run
from lib.training.config import Finetune, Lora, check_both_methods
from lib.trtllm.adapter_format import misfits as adapter_misfits
from lib.trtllm.images import WRITTEN_FOR, engines, rebuild
from stages.base_model import BaseModel
from stages.chat import Chat
from stages.dataset import Dataset
from stages.engine import Engine, with_room, with_variant
from stages.limits import Limits
from stages.machine import usable_memory_gib
from stages.repository import Repository
from stages.style import Style
from stages.trtllm_serve import TrtllmServe, misfit_moe
from tools.fetch import fetch_images, fetch_model, has_image


@dataclass
class Estimate:
    minutes: int
    disk_gb: float
    images_gb: float
    memory_gb: float
    gpu_memory_gb: float


def missing_resources(p, free_disk_gb, machine_memory_gib, cards):
    """The machine's shortages for the estimate `p`, as sentences that say what to do; cards: those of gpus()."""
    missing = []
    if free_disk_gb < p.disk_gb:
        missing.append(
            f"disk: {free_disk_gb:.1f} GB are free here, {p.disk_gb:g} GB are needed; free some or move the clone"
        )
    if machine_memory_gib * 1.074 < p.memory_gb:
        missing.append(
            f"memory: this machine has {machine_memory_gib:g} GiB, {p.memory_gb:g} GB are needed; "
            "a smaller finetune.micro_batch in params.yaml takes less"
        )
    # A GPU that shares the machine's memory has no figure of its own, and is held to the line above.
    largest = max(((card["memory_mib"] or machine_memory_gib * 1024) * 2**20 / 1e9 for card in cards), default=0)
    if p.gpu_memory_gb and not cards:
        missing.append("GPU: nvidia-smi finds none; `make reproduce PROFILE=embedded` needs none")
    elif largest < p.gpu_memory_gb:
        missing.append(f"GPU: the largest has {largest:.0f} GB, {p.gpu_memory_gb:g} GB are needed")
    return missing


def missing_disk(p, free_gb, root, root_free_gb, shared):
    """[what Docker's storage lacks for the images of the estimate `p`]; shared: it lies on the checkout's file system,
    which then has to hold both. root: its folder, None where that is unknown or not on this machine."""
    if not p.images_gb or root is None:
        return []
    free, needed = (free_gb, p.disk_gb + p.images_gb) if shared else (root_free_gb, p.images_gb)
    if free >= needed:
        return []
    both = " and of this checkout" if shared else ""
    return [f"images: {free:.1f} GB are free in {root}, {needed:g} GB of images{both} are needed; free some, or move "
            "Docker's data-root"]  # fmt: skip


def docker_storage():
    """The folder in which Docker keeps images; None without an engine, or where that is another machine's folder."""
    words = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    if shutil.which("docker") is None:
        return None
    root = Path(subprocess.run(words, capture_output=True, text=True).stdout.strip() or "-")
    return root if root.is_absolute() and root.exists() else None


def disk_of_images(p, images, free_gb):
    """The shortages of Docker's storage, a line each; images that are there already need no more room."""
    references = [image.removeprefix("docker://").split("+")[0] for image in images.values() if "docker://" in image]
    root = docker_storage() if p.images_gb and not all(map(has_image, references)) else None
    if root is None:
        return []
    shared = os.stat(root).st_dev == os.stat(".").st_dev
    return missing_disk(p, free_gb, root, shutil.disk_usage(root).free / 1e9, shared)


def missing_images(images, docker_answers):
    """The obstacles to the images in use, a line each; docker_answers: the engine can be reached."""
    missing = []
    references = sorted({image.split("+")[0] for image in images.values() if image.startswith("docker://")})
    if references and not docker_answers:
        missing.append("Docker: no engine answers; install Docker with the NVIDIA container toolkit and start it")
    for reference in references:
        if reference.endswith("UNRESOLVED"):
            missing.append(
                f"image: {reference.removeprefix('docker://')} has no digest yet; `make digests` resolves it"
            )
    return missing


def checked():
    """params.yaml, whose sections read here are as their stages want them; else UserError, as theirs."""
    for section in (BaseModel, Bench, Chat, Dataset, Engine, Limits, Lora, Repository, Style, TrtllmServe):
        read_params(section)
    check_both_methods(read_params(Finetune).variants)
    return load_yaml("params.yaml")


def in_use(images, params):
    """{role: image} of what a whole run starts: no server that is not measured, no engine that is not built."""
    roles = {"tools", "pytorch", "client", *started_servers(params["bench"])}
    if params["repository"]["engine"] == "none":
        roles.discard("triton")
    if params["repository"]["engine"] == "tensorrtllm" or params["engine"]["route"] != "none":
        roles.add("triton")
    return {role: image for role, image in images.items() if role in roles}


def started_servers(bench):
    """The kinds of servers (triton, vllm, trtllm) that the experiments of the section `bench` start."""
    lists = [bench["definitions"][name].get("servers", bench["servers"]) for name in bench["experiments"]]
    return {server.partition("-")[0] for servers in lists for server in servers} & set(bench["servers"])


def misfit_engine(p, lora, gpu_count, served=None):
    """Why TensorRT-LLM's engine could not serve the adapters, or not be built: said before hours of training.

    served: repository.engine_variant where that engine is to be served, else None.
    """
    lines = []
    if served and (p.route == "none" or served not in p.variants):
        built = "none" if p.route == "none" else ", ".join(p.variants)
        lines.append(
            f"engine: repository.engine_variant is {served}, built are {built}: engine.route and engine.variants"
        )
    if p.route == "none":
        return lines
    types = sorted({with_variant(p, variant).dtype for variant in p.variants})
    if len(types) > 1:
        lines.append(f"engine: engine.dtype is {' and '.join(types)}; the adapters are stored in one of them")
    for variant in p.variants:
        settings = with_room(with_variant(p, variant), lora.r)
        reasons = adapter_misfits(lora.target_modules, lora.r, settings.lora_target_modules, settings.max_lora_rank)
        lines += [f"engine {variant}: the adapters do not fit: {reason}" for reason in reasons]
        if gpu_count and settings.tp_size > gpu_count:
            lines.append(f"engine {variant}: engine.tp_size is {settings.tp_size}, this machine has {gpu_count} GPUs")
    return lines


def misfit_serve(p, image, gpu_count):
    """Why trtllm-serve could not start in its image."""
    reasons = [reason] if (reason := misfit_moe(p, image)) else []
    if gpu_count and p.tp_size > gpu_count:
        reasons.append(f"trtllm_serve: trtllm_serve.tp_size is {p.tp_size}, this machine has {gpu_count} GPUs")
    return reasons


def misfits(params, images, gpu_count):
    """The settings of params.yaml that TensorRT-LLM's two servers cannot serve, a line each."""
    lora, served = Lora(**params["lora"]), params["repository"]
    variant = served["engine_variant"] if served["engine"] == "tensorrtllm" else None
    reasons = misfit_engine(Engine(**params["engine"]), lora, gpu_count, variant)
    if "trtllm" in started_servers(params["bench"]):
        reasons += misfit_serve(TrtllmServe(**params["trtllm_serve"]), images["trtllm"], gpu_count)
    return reasons


def to_rebuild(image):
    """The engines that are there and do not fit this machine, a line each; DVC builds them anew."""
    gpu = architecture()
    lines = [(variant, rebuild(engine, gpu, image)) for variant, engine in engines(results("engine")).items()]
    return [f"engine {variant}: {line}" for variant, line in lines if line]


def old_drivers(images, cards):
    """The images of {role: image} made for a newer driver than the GPUs', a line each; cards: what gpus() gives."""
    version = cards[0]["driver"] if cards else ""
    major = version.split(".")[0]
    wanted = {role: facts.get("driver", 0) for role, facts in load_yaml(WRITTEN_FOR).items()}
    return [
        f"driver {version}: the image of {role} was made for {wanted[role]} or newer; only a data-centre GPU may do "
        "with it, through the image's compatibility libraries"
        for role, image in images.items()
        if image.startswith("docker://") and cards and not (major.isdigit() and int(major) >= wanted[role])
    ]


def docker_answers():
    """True when a Docker engine can be reached."""
    return (
        shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


def check(params, images, tell=False):
    """UserError with all that this machine lacks for these parameters and images; tell: print what a run takes, and
    fetch its images and models."""
    p, profile = Estimate(**params["estimate"]), params["profile"]
    missing = missing_images(in_use(images, params), docker_answers())
    cards = gpus()
    missing += misfits(params, images, len(cards))
    # Once a whole run stands here, its environments and results do too: a re-run takes little more room.
    disk = Estimate(**{**p.__dict__, "disk_gb": 1.0}) if (results("report") / "index.html").exists() else p
    free = shutil.disk_usage(".").free / 1e9
    missing += missing_resources(disk, free, usable_memory_gib(), cards)
    missing += disk_of_images(disk, in_use(images, params), free)
    if missing:
        raise UserError(f"profile {profile} cannot run here:\n  " + "\n  ".join(missing))
    if not tell:
        return
    for line in to_rebuild(images["triton"]) + old_drivers(in_use(images, params), cards):
        print(line)
    gpu = f", {p.gpu_memory_gb:g} GB on the GPU for {p.minutes / 60:.1f} hours" if p.gpu_memory_gb else ""
    docker = f", {p.images_gb:g} GB of images" if p.images_gb else ""
    print(
        f"profile {profile}: a whole run takes about {p.minutes} min, {p.disk_gb:g} GB of disk and "
        f"{p.memory_gb:g} GB of memory{docker}{gpu}; what is up to date is skipped",
        flush=True,
    )
    fetch_images(in_use(images, params))
    fetch_model(params["base_model"], images["pytorch"])


def main():
    read_params(Estimate)
    check(checked(), load_yaml("containers/images.yaml")["images"], tell=True)


if __name__ == "__main__":
    run(main)
