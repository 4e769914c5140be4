"""
Estimates a card's throughput from NVIDIA's measured kernels: python -m tools.estimate CARD MODEL FORMAT USERS [ENGINE]

CARD is a name of the kernels' database (h100_sxm, a100_sxm, l40s), MODEL a shape of data/shapes, FORMAT bf16, fp8 or
mxfp4, USERS numbers with commas, ENGINE trtllm or vllm. 512 tokens in, 256 out, one GPU. The band is what our measured
vLLM points leave of doubt; it comes from the newest estimates.json.
"""

import os
import sys
from pathlib import Path

from lib.claims.runs import optional
from lib.core.stage import UserError, load_yaml, results, run
from lib.estimate.calibration import point_bands
from lib.estimate.points import band_format
from lib.model.shapes import read_shape

USAGE = "make estimate CARD=a100_sxm MODEL=llama-2-7b FORMAT=bf16 USERS=1,16,64"
LENGTHS = (512, 256)
FORMATS = {"bf16": "bf16", "fp8": "fp8", "mxfp4": "bf16"}  # of the weights, each with its KV cache
FILE = "estimate/estimates.json"


def asked(words):
    """(card, model, format, users, engine) of the command line; UserError shows a whole command."""
    if len(words) not in (4, 5):
        raise UserError(f"CARD, MODEL, FORMAT and USERS are needed, as in: {USAGE}")
    card, model, weights, users, engine = [*words, "trtllm"][:5]
    if weights not in FORMATS:
        raise UserError(f"FORMAT is {weights}; use one of {', '.join(FORMATS)}")
    numbers = users.split(",")
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise UserError(f"USERS is {users}; use numbers with commas, as in 1,16,64")
    return card, model, weights, [int(number) for number in numbers], engine


def calibration():
    """The bands of this checkout's estimate, or of a published one; empty without either."""
    files = [results("estimate") / "estimates.json", *sorted(Path("results/reference").glob(f"*/{FILE}"))]
    return next((data["calibration"]["bands"] for file in files if (data := optional(file))), [])


def table(points, weights, engine, bands):
    """The lines of the table: users, tokens/s with its band, tokens/s a user, ms between tokens."""
    yield f"{'users':>6}  {'tokens/s':>9}  {'band':>17}  {'a user':>7}  {'ITL ms':>7}"
    for point in points:
        band = point_bands(point, band_format(engine, weights), bands).get("output_tokens_per_second")
        ends = f"{band['low']:,.0f} to {band['high']:,.0f}" if band else "not calibrated"
        rate, user = point["output_tokens_per_second"], point["per_user_tokens_per_second"]
        yield f"{point['concurrency']:>6}  {rate:>9,.0f}  {ends:>17}  {user:>7,.0f}  {point['itl_ms_avg']:>7.2f}"


def main():
    card, model, weights, users, engine = asked(sys.argv[1:])
    config = read_shape(model, "MODEL is")
    if os.environ.get("REPO_IMAGE", "").startswith("venv:tools"):
        image = load_yaml("containers/images.yaml")["images"]["estimate"]
        os.execv("containers/run", ["containers/run", image, "python", "-m", "tools.estimate", *sys.argv[1:]])

    from lib.estimate.kernels import NotEstimated, describe, estimate_point

    try:
        formats = weights, FORMATS[weights]
        points = [estimate_point(card, engine, config, formats, LENGTHS, number) for number in users]
    except NotEstimated as missing:
        raise UserError(f"FORMAT is {weights}: not estimated, {missing}") from None
    print(
        f"Estimated, not measured: {model} in {weights}, kernels of {describe(card, engine)}; 512 tokens in, 256 out."
    )
    print("\n".join(table(points, weights, engine, calibration())))
    print(
        "The band is the error of such estimates on our vLLM points on an H200; another card or engine may differ more."
    )


if __name__ == "__main__":
    run(main)
