"""
The estimated points: every measured vLLM point of the runs, and serving points that no run here can measure.
"""

from lib.analysis.machine_limit import point_limit, speculates, tensor_parallel_gpus
from lib.estimate.calibration import bounded_bands, calibration_row, point_bands
from lib.estimate.kernels import NotEstimated, describe, estimate_point

# The package's name of a card, by how the driver's name begins.
CARDS = {
    "NVIDIA H200": "h200_sxm",
    "NVIDIA H100 80GB HBM3": "h100_sxm",
    "NVIDIA A100-SXM": "a100_sxm",
    "NVIDIA L40S": "l40s",
    "NVIDIA B200": "b200_sxm",
}
# A format without kernels is bounded by estimates in these: (weights, KV cache).
BOUNDS = (("bf16", "bf16"), ("fp8", "fp8"))


def calibrate(experiments, limits):
    """(rows, bounded, skipped) of all measured vLLM points: beside their estimate, beside the bounds of a format
    without kernels, and those that have neither, with the reason.

    experiments: {(run, experiment, server): points.json}; limits: {run: limits.json}.
    """
    rows, bounded, skipped = [], [], []
    for (run, experiment, server), data in experiments.items():
        labels = {"run": run, "experiment": experiment, "server": server, "engine": data["engine"]}
        if reason := not_calibrated(data):
            skipped.append({**labels, "reason": reason})
            continue
        formats = data["weights_format"], data["kv_format"]
        labels |= {"weights_format": formats[0], "kv_format": formats[1]}
        for point in data["points"]:
            if point["valid"] and point["variant"] == "corrected":
                try:
                    rows.append(beside_estimate(labels, data, point, formats))
                except NotEstimated as missing:
                    labels["not_estimated"] = str(missing)
                    bounded.append(beside_bounds(labels, data, point, limits.get(run)))
    return rows, bounded, skipped


def not_calibrated(data):
    """Why a server's points are no calibration; None where they are."""
    if not data["points"]:
        return data["not_measured"] or "no points"
    if data["engine_is_stand_in"] or not data["engine"].startswith("vLLM"):
        return f"the engine is {data['engine']}"
    if card_of(data) is None:
        return "no card with measured kernels"
    if speculates(data):
        return "the server guesses tokens"
    return None


def card_of(data):
    """The package's name of the card that a result was measured on; None for a CPU and a card without kernels."""
    names = [gpu["name"] for gpu in data["made_by"]["gpus"]]
    return next((card for start, card in CARDS.items() if names and names[0].startswith(start)), None)


def load_of(data, point):
    """((tokens in, tokens out), users, GPUs) of a measured point."""
    lengths = point["input_tokens_asked"], point["output_tokens_asked"]
    return lengths, point["concurrency"], tensor_parallel_gpus(data["server_command"])


def beside_estimate(labels, data, point, formats):
    """A calibration row: a measured point and its estimate."""
    lengths, users, gpus = load_of(data, point)
    card = card_of(data)
    estimated = estimate_point(card, "vllm", data["base_model"]["config"], formats, lengths, users, gpus)
    load = {"input_tokens_asked": lengths[0], "output_tokens_asked": lengths[1], "concurrency": users, "gpus": gpus}
    return calibration_row({**labels, **load, "kernels": describe(card, "vllm")}, point, estimated)


def beside_bounds(labels, data, point, limits):
    """A measured point of a format without kernels, the estimates in other formats, and the card's limit."""
    lengths, users, gpus = load_of(data, point)
    config = data["base_model"]["config"]
    return {
        **labels,
        "concurrency": users,
        "measured": point,
        "estimates": [
            estimate_point(card_of(data), "vllm", config, formats, lengths, users, gpus)
            | {"weights_format": formats[0]}
            for formats in BOUNDS
        ],
        "limit": as_numbers(point_limit(data, point, limits)),
    }


def as_numbers(limit):
    """A limit under the names of a point's numbers; empty where it is unknown."""
    if not limit:
        return {}
    return {
        "output_tokens_per_second": limit["tokens_per_second"],
        "per_user_tokens_per_second": limit["per_user_tokens_per_second"],
        "itl_ms_avg": limit["itl_ms"],
    }


def check_bounds(bounded, bands):
    """The same with the band that the bounds give, and whether the measured number lies inside."""
    return [
        {key: row[key] for key in ("run", "experiment", "server", "weights_format", "concurrency", "not_estimated")}
        | {"numbers": inside(row["measured"], bounded_bands(with_bands(row["estimates"], "vllm", bands), row["limit"]))}
        for row in bounded
    ]


def inside(measured, band):
    """{number: {measured, low, high, inside}}."""
    return {
        name: {"measured": measured[name], **ends, "inside": ends["low"] <= measured[name] <= ends["high"]}
        for name, ends in band.items()
    }


def with_bands(points, engine, bands):
    """The points with the band of their engine and format."""
    return [
        {**point, "band": point_bands(point, band_format(engine, point["weights_format"]), bands)} for point in points
    ]


def band_format(engine, weights):
    """The format whose band counts; None, the widest, for an engine that no run has measured."""
    return weights if engine == "vllm" else None


def published_points(asked, configs, limits, bands):
    """The estimate of every entry of data/estimates.yaml, for each of its users, in the form of a measured point.

    configs: {shape: config}; limits: {card: limits.json} for formats without kernels.
    """
    for entry in asked:
        for users in entry["users"]:
            yield published_point(entry, users, configs[entry["shape"]], limits.get(entry["card"]), bands)


def published_point(entry, users, config, limits, bands):
    """One estimated point with its band, what made it and what to know of it."""
    card, engine, lengths = entry["card"], entry["engine"], tuple(entry["lengths"])
    formats = entry["weights_format"], entry["kv_format"]
    labels = {
        "id": f"{entry['id']}-c{users}",
        **{key: entry[key] for key in ("shape", "engine", "card", "weights_format", "kv_format")},
        "kernels": describe(card, engine),
    }
    try:
        point = estimate_point(card, engine, config, formats, lengths, users)
    except NotEstimated as missing:
        return bounded_point(labels, str(missing), entry, users, config, limits, bands)
    band = point_bands(point, band_format(engine, formats[0]), bands)
    reasons = band_reasons(engine) if band else ["no band: no such points"]
    return {**labels, **point, "bounded": False, "band": band, "reasons": reasons + notes(entry)}


def notes(entry):
    """The entry's own note, as a list."""
    return [entry["note"]] if "note" in entry else []


def band_reasons(engine):
    """The limits of a band's meaning, as sentences."""
    if engine == "vllm":
        return ["the band is that of vLLM's points in this format, measured on an H200"]
    return ["the band is vLLM's widest of all formats, measured on an H200; no point of this engine was measured here"]


def bounded_point(labels, missing, entry, users, config, limits, bands):
    """A point of a format without kernels: its value is the nearest format's, its band runs up to the card's limit."""
    lengths = tuple(entry["lengths"])
    points = [
        estimate_point(entry["card"], entry["engine"], config, formats, lengths, users) | {"weights_format": formats[0]}
        for formats in BOUNDS
    ]
    data = {**labels, "base_model": {"config": config}, "server_command": []}
    limit = as_numbers(point_limit(data, {"concurrency": users, **lengths_asked(lengths)}, limits))
    words = " and ".join("/".join(formats) for formats in BOUNDS)
    reasons = [
        missing,
        f"bounded by the estimates in {words} (weights/KV cache) and by the card's own limit: 4 bits are taken to be "
        "no slower than 16, as in all our int4 points",
        "the value is that of fp8/fp8, the nearest format with kernels",
        *band_reasons(entry["engine"]),
    ]
    value = {key: number for key, number in points[-1].items() if key not in ("weights_format", "memory_gib")}
    band = bounded_bands(with_bands(points, entry["engine"], bands), limit)
    return {**labels, **value, "bounded": True, "band": band, "reasons": reasons + notes(entry)}


def lengths_asked(lengths):
    return {"input_tokens_asked": lengths[0], "output_tokens_asked": lengths[1]}
