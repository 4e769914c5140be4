"""
The limits of this machine: bytes a second that its memory copies and reads, operations a second of its matrix units.
Every served token is compared with these (lib/analysis/roofline.py).

in:   results/<profile>/machine/machine.json
out:  results/<profile>/limits/limits.json   each probe with its median, least and most; a limit is the median of its
      fastest probe, since nothing that is measured later may be faster
"""

import statistics
from dataclasses import dataclass

from lib.core.gpu import torch_device
from lib.core.provenance import write_metrics
from lib.core.stage import UserError, read_json, read_params, results, run
from lib.training.flops import product, rate

MIB = 2**20
COLUMNS = 8192  # of the matrix that is multiplied with a vector: a row of 16 KiB, as in a linear layer


@dataclass
class Limits:
    mib: int
    side: int
    repeats: int
    calls: int

    def __post_init__(self):
        for name in ("mib", "repeats", "calls"):
            if getattr(self, name) < 1:
                raise UserError(f"params.yaml: limits.{name} is {getattr(self, name)}; use 1 or more")
        if self.side < 16 or self.side % 16:
            raise UserError(f"params.yaml: limits.side is {self.side}; FP8 units want a multiple of 16")


# The probes: (device, p) -> (work, bytes or operations of one call).


def copying(device, p):
    """A copy from memory to memory: every byte is read once and written once."""
    import torch

    source = torch.ones(p.mib * MIB // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def adding(device, p):
    """The sum of many numbers: every byte is read once, nothing is written."""
    import torch

    numbers = torch.ones(p.mib * MIB // 4, device=device, dtype=torch.float32)
    return numbers.sum, numbers.nbytes


def weighing(device, p):
    """A large matrix times a vector, as a linear layer does for one token: the matrix is read once."""
    import torch

    kind = torch.bfloat16 if device == "cuda" else torch.float32  # bf16 on a CPU may be computed, not read
    width = torch.empty((), dtype=kind).element_size()
    matrix = torch.ones(p.mib * MIB // (COLUMNS * width), COLUMNS, device=device, dtype=kind)
    vector = torch.ones(COLUMNS, device=device, dtype=kind)
    return lambda: torch.mv(matrix, vector), matrix.nbytes


def multiplying_bf16(device, p):
    import torch

    return product(device, p.side, torch.bfloat16)


def multiplying_fp32(device, p):
    import torch

    return product(device, p.side, torch.float32)


def multiplying_fp8(device, p):
    """The same in FP8 (E4M3), one scale a matrix, the result in bf16, as vLLM's --quantization fp8 multiplies."""
    import torch

    if device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise RuntimeError("no FP8 matrix units: NVIDIA GPUs have them from compute capability 8.9")
    left, right = (torch.randn(p.side, p.side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scalar = torch.ones((), device=device)
    return (
        lambda: torch._scaled_mm(
            left, right.t(), scale_a=scalar, scale_b=scalar, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        2 * p.side**3,
    )


# The limit -> the probes that could reach it. The matrix units of a CPU may be made for fp32 or for bf16.
PROBES = {
    "bytes_per_second": {"copy": copying, "sum": adding, "matrix_vector": weighing},
    "flops_per_second": {"matrix_bf16": multiplying_bf16},
    "fp8_flops_per_second": {"matrix_fp8": multiplying_fp8},
}
ON_A_CPU = {"flops_per_second": {"matrix_bf16": multiplying_bf16, "matrix_fp32": multiplying_fp32}}


def run_probe(make, device, p):
    """{median, least, most} a second of `repeats` measurements of `calls` calls each; None and why where it cannot run.

    A probe that this GPU, this torch or this much free memory does not allow leaves the others alone.
    """
    try:
        work, amount = make(device, p)
        rates = [rate(work, amount, p.calls) for _ in range(p.repeats)]
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return {"median": None, "least": None, "most": None, "not_measured": reason}
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates), "not_measured": None}


def best(probes):
    """The median of the fastest probe, None where none ran."""
    return max((probe["median"] for probe in probes.values() if probe["median"]), default=None)


def main():
    p = read_params(Limits)
    machine = read_json(results("machine") / "machine.json")

    import torch

    device = torch_device()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{machine['cpu']}, {torch.get_num_threads()} threads"
    kinds = PROBES | (ON_A_CPU if device == "cpu" else {})
    by_limit = {
        limit: {probe: run_probe(make, device, p) for probe, make in probes.items()} for limit, probes in kinds.items()
    }
    limits = {limit: best(probes) for limit, probes in by_limit.items()}
    write_metrics(
        results("limits") / "limits.json",
        {"device": name, "mib": p.mib, "side": p.side, "repeats": p.repeats, **limits, "probes": by_limit},
    )
    for limit, probes in by_limit.items():
        for probe, measured in probes.items():
            rates = f"{measured['median']:.3g}" if measured["median"] else f"not measured: {measured['not_measured']}"
            print(f"limits: {probe} {rates} {limit.replace('_', ' ')}", flush=True)


if __name__ == "__main__":
    run(main)
