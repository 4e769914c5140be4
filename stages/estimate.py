"""
Estimates TensorRT-LLM on the writeup's card from NVIDIA's measured kernels, calibrated on vLLM.

in:   data/estimates.yaml, data/shapes, results/reference/*/{bench,limits}
out:  results/<profile>/estimate/estimates.json   calibration (measured beside estimated, bands), points with their band
                                                  and reasons, NVIDIA's own figures beside the estimate, the gap
An estimate is never mixed with a measurement: it has its own file and its own evidence.
"""

from pathlib import Path

from lib.claims.runs import optional
from lib.core.provenance import installed, write_metrics
from lib.core.stage import UserError, load_yaml, read_json, results, run
from lib.estimate.calibration import make_bands
from lib.estimate.kernels import NotEstimated, describe, estimate_point
from lib.estimate.points import CARDS, calibrate, check_bounds, published_points
from lib.model.shapes import read_shape

PACKAGE = "aiconfigurator-core"


def read_experiments(folders):
    """{(run, experiment, server): points.json} of all runs."""
    return {
        (name, *path.parts[-3:-1]): read_json(path)
        for name, folder in folders.items()
        for path in sorted(folder.glob("bench/*/*/points.json"))
    }


def card_limits(limits):
    """{the package's card: limits.json} with the most bandwidth that a run has measured."""
    best = {}
    for measured in limits.values():
        card = next((card for start, card in CARDS.items() if measured.get("device", "").startswith(start)), None)
        if card and measured["bytes_per_second"] > best.get(card, {"bytes_per_second": 0})["bytes_per_second"]:
            best[card] = measured
    return best


def outside_check(outside, configs):
    """NVIDIA's published figures beside the estimates for several numbers of users."""
    for point in outside["points"]:
        load = configs[point["shape"]], (point["weights_format"], point["kv_format"]), tuple(point["lengths"])
        yield {**point, "source": outside["source"], "kernels": describe(point["card"], "trtllm")} | {
            "estimated": {users: rate_of(point["card"], load, users) for users in outside["users"]}
        }


def rate_of(card, load, users):
    """Estimated tokens/s of TensorRT-LLM; None where its kernels are missing."""
    try:
        return estimate_point(card, "trtllm", *load, users)["output_tokens_per_second"]
    except NotEstimated:
        return None


def explain_gap(gap, points):
    """The writeup's figure beside its estimate, and what accounts for the difference: not measured yet."""
    by_id = {point["id"]: point for point in points}
    band = by_id[gap["point"]]["band"]["output_tokens_per_second"]
    unquantised = by_id[gap["unquantised"]]["output_tokens_per_second"]
    return {
        **gap,
        "band": band,
        "share_of_lowest": gap["published"] / band["low"],
        "unquantised_tokens_per_second": unquantised,
        "share_of_unquantised": gap["published"] / unquantised,
    }


def check_package():
    """UserError where this is not the environment that has the kernel data."""
    if installed(PACKAGE) is None:
        raise UserError(
            f"estimate needs the package {PACKAGE}; run it in its own environment: "
            "`containers/run venv:tools dvc repro studies/dvc.yaml:estimate`"
        )


def main():
    check_package()
    asked = load_yaml("data/estimates.yaml")
    folders = {folder.name: folder for folder in sorted(Path("results/reference").glob("*/"))}
    limits = {name: optional(folder / "limits/limits.json") for name, folder in folders.items()}
    shapes = {point["shape"] for point in [*asked["points"], *asked["outside"]["points"]]}
    configs = {shape: read_shape(shape, "data/estimates.yaml: shape is") for shape in sorted(shapes)}

    rows, bounded, skipped = calibrate(read_experiments(folders), limits)
    bands = make_bands(rows)
    points = list(published_points(asked["points"], configs, card_limits(limits), bands))
    calibration = {"rows": rows, "bands": bands, "bounded": check_bounds(bounded, bands), "skipped": skipped}
    path = results("estimate") / "estimates.json"
    write_metrics(
        path,
        {
            "package": f"{PACKAGE} {installed(PACKAGE)}",
            "calibration": calibration,
            "points": points,
            "outside": list(outside_check(asked["outside"], configs)),
            "gap": explain_gap(asked["gap"], points),
        },
    )
    print(f"estimate: {len(points)} points, calibrated on {len(rows)} measured ones of vLLM, in {path}")


if __name__ == "__main__":
    run(main)
