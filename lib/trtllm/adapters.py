"""
The adapters that a server is given, and their task ids.
"""

from lib.core.stage import REPRO, UserError

MODELS = ("base", "lora")
# From 1: NVIDIA's client drops a task id of 0, and the stand-in reads 0 as the base model.
TASKS = {1: "lora", 2: "qlora"}


def adapters(model, finetune):
    """Task id -> the results folder of the adapter that answers it; UserError for MODEL=lora without one."""
    if model == "base":
        return {}
    folders = {task: finetune / method / "adapter" for task, method in TASKS.items()}
    there = {task: folder for task, folder in folders.items() if (folder / "adapter_config.json").exists()}
    if not there:
        raise UserError(f"{finetune}: no adapter there; `{REPRO} finetune` makes them")
    return there
