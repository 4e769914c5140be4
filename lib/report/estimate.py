"""
The report's section on estimates, as blocks (lib/report/page.py): TensorRT-LLM's points from NVIDIA's measured kernels,
how far such estimates are from what was measured, and the writeup's figure beside them.
"""

from lib.analysis.metrics import PER_USER, RATE, metric_of
from lib.claims.format import show
from lib.report import h100

NAMES = {name: metric_of(name).column for name in (RATE, PER_USER, "itl_ms_avg")}


def estimates(ledger, summary):
    """The section of the first run that has estimates; nothing where none has."""
    data = h100.read_estimates(ledger)
    if not data:
        return
    yield ("heading", 2, "Estimates for what was not measured")
    yield ("text", about(data))
    yield from gap(data["gap"])
    yield h100.figure(data, summary)
    yield ("table", ["engine", "model", "weights / KV", "users", "tokens/s", "band", "kernels"], point_rows(data))
    yield ("fold", "Calibration: measured vLLM points beside their estimates", list(calibration(data)))


def about(data):
    """What an estimate is, and how good."""
    ratios = [row["numbers"][RATE]["ratio"] for row in data["calibration"]["rows"]]
    return (
        f"Estimated, not measured: {data['package']} adds up the time of kernels that NVIDIA measured on the card. "
        f"On {len(ratios)} points of vLLM that we measured on an H200, measured over estimated tokens/s is "
        f"{min(ratios):.2f} to {max(ratios):.2f}; that error makes the band. TensorRT-LLM itself was not "
        "measured here, and the time to the first token is not estimated well enough for a verdict. A format without "
        "kernels (int4) is bounded by the estimates in bf16 and FP8 and by the card's own limit: such a bound can only "
        "disagree."
    )


def gap(gap):
    """The writeup's figure beside the estimate, and what may account for the difference."""
    yield (
        "text",
        f"The writeup's Triton gave {show(gap['published'])} tokens/s at 16 users in 4 bits: "
        f"{gap['share_of_unquantised']:.2f} of the {show(round(gap['unquantised_tokens_per_second']))} estimated for "
        f"TensorRT-LLM unquantised, and {gap['share_of_lowest']:.2f} of the least that the band allows.",
    )
    yield ("table", ["part of the gap", "share", "missing"], [
        [part["part"], "not measured", part["not_measured"]] for part in gap["parts"]
    ])  # fmt: skip


def point_rows(data):
    """One row a point."""
    return [
        [
            *(point["kernels"].split()[0], point["shape"], f"{point['weights_format']} / {point['kv_format']}"),
            str(point["concurrency"]),
            "bounded" if point["bounded"] else show(round(point[RATE])),
            band_cell(point),
            point["kernels"],
        ]
        for point in data["points"]
    ]


def band_cell(point):
    """A point's band in words."""
    band = point["band"].get(RATE)
    return f"{show(round(band['low']))} to {show(round(band['high']))}" if band else "none"


def calibration(data):
    """Every measured point beside its estimate, the bands, the bounded ones, and NVIDIA's own figures."""
    header = ["run", "experiment", "server", "weights", "GPUs", "in / out", "users"]
    rows = [
        [
            *(row["run"], row["experiment"], row["server"], row["weights_format"], str(row["gpus"])),
            *(f"{row['input_tokens_asked']} / {row['output_tokens_asked']}", str(row["concurrency"])),
            *(
                f"{row['numbers'][name]['ratio']:.2f}" if name in row["numbers"] else "—"
                for name in (*NAMES, "ttft_ms_avg")
            ),
        ]
        for row in data["calibration"]["rows"]
    ]
    yield ("text", "Measured over estimated.")
    yield ("table", [*header, *NAMES.values(), "TTFT"], rows)
    yield ("text", "Bands: least and most of measured over estimated, with 1 always inside.")
    yield (
        "table",
        ["weights", "load", "number", "points", "least", "most"],
        list(map(band_row, data["calibration"]["bands"])),
    )
    inside = [number["inside"] for row in data["calibration"]["bounded"] for number in row["numbers"].values()]
    yield ("text", f"Our int4 points lie inside their bounds in {sum(inside)} of {len(inside)} numbers.")
    yield ("text", "TensorRT-LLM's own figures, whose number of concurrent requests is not published:")
    header = ["card", "model", "published tokens/s", "estimated tokens/s by users", "source"]
    yield ("table", header, list(map(outside_row, data["outside"])))


def band_row(band):
    """A band's table row."""
    ends = [f"{band[end]:.2f}" for end in ("low", "high")]
    return [band["weights_format"], band["load"], NAMES[band["number"]], str(band["points"]), *ends]


def outside_row(point):
    """NVIDIA's figure and the estimates for several numbers of users."""
    estimated = [f"{users}: {show(round(rate))}" for users, rate in point["estimated"].items() if rate]
    return [point["card"], point["shape"], show(point[RATE]), ", ".join(estimated), point["source"]]
