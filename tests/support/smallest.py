"""The smallest parameters with which every stage of the graph still does its work."""

SMALLEST = {
    "dataset": {"train_rows": 8, "validation_rows": 4},
    "finetune": {"max_steps": 2, "micro_batch": 2, "accumulation": 1, "eval_steps": 2},
    "chat": {"max_new_tokens": 4},
    "style": {"prompts": 0, "max_new_tokens": 4},
    "bench": {
        "lengths": [[32, 8]],
        "repeats": 1,
        "concurrency": [1],
        "requests_per_stream": 2,
        "min_requests": 2,
        "warmup_requests": 1,
    },
}
