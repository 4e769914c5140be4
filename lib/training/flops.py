"""
Utilisation of a fine-tuning: the model's operations a second over the rate at which the same card multiplies large
matrices.
"""

import time

# 8192 x 8192 x 8192: large enough that nothing but the matrix units limits it.
SIDE, REPEATS = 8192, 50


def flops_per_token(model):
    """Operations that one token of LoRA training asks of the model's frozen matrices, head included.

    Two a parameter going forward (a multiplication and an addition) and two for the gradient of the layer's input.
    Frozen weights get no gradient of their own, which full fine-tuning's six a parameter include
    (https://arxiv.org/abs/2001.08361, section 2.1). Attention and the adapter, a few percent, are left out, and so is
    what checkpointing computes again.
    """
    leaves = (module for module in model.modules() if not list(module.children()))
    matrices = (leaf for leaf in leaves if hasattr(leaf, "in_features") and not leaf.weight.requires_grad)
    return 4 * sum(matrix.in_features * matrix.out_features for matrix in matrices)


def matrix_rate():
    """Operations a second of the GPU in bf16 matrix multiplication, measured now; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    multiply, flops = product("cuda", SIDE, torch.bfloat16)
    return rate(multiply, flops, REPEATS)


def product(device, side, dtype):
    """(a function that multiplies two random square matrices, its operations): 2 side^3, an addition and a product."""
    import torch

    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2 * side**3


def rate(work, amount, repeats):
    """`amount` a second of work(), called `repeats` times in a row."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(2):  # the clock settles under the first load; the second one counts
        wait()
        begun = time.monotonic()
        for _ in range(repeats):
            work()
        wait()
    return repeats * amount / (time.monotonic() - begun)


def utilisation(flops, tokens_per_second, gpus):
    """{flops_per_token, matrix_flops_per_second, utilisation}; None where the rate or the speed is not known.

    flops: of a token; tokens_per_second: of all GPUs together; matrix_flops_per_second: of one.
    """
    rate = matrix_rate()
    known = rate and tokens_per_second
    return {
        "flops_per_token": flops,
        "matrix_flops_per_second": rate,
        "utilisation": tokens_per_second * flops / (gpus * rate) if known else None,
    }
