"""
The report's chapter on serving: from a first, partial run on an H200 (tests/fixtures/serving/h200) and from runs of the
embedded profile's vLLM (tests/fixtures/serving), both as they were written.
"""

import copy
import json

import pytest
from conftest import REPO

from lib.analysis.compare import compare, noise
from lib.analysis.machine_limit import point_limit
from lib.analysis.metrics import RATE
from lib.analysis.summary import PUBLISHED_POINTS, read_experiments, summarise, summarise_experiment
from lib.bench.metrics import summarise_repeats
from lib.core.stage import read_json, write_json
from lib.report import client_ablation, serving, serving_points, validity
from lib.report.page import Grey, html_table, to_html, to_markdown

CPU = REPO / "tests/fixtures/serving"
H200, PUBLISHED = CPU / "h200", REPO / "results/reference/h200-vllm"
LIMITS = read_json(H200 / "limits/limits.json")


@pytest.fixture
def int4():
    """points.json of vLLM with the int4 shape on the H200."""
    return read_json(H200 / "bench/int4/vllm/points.json")


@pytest.fixture
def walked():
    return read_json(CPU / "bench/walk/vllm/points.json")


def three_times(data, *factors):
    """The same run with three repeats of every point, whose throughput is that of the one times these."""
    found = copy.deepcopy(data)
    found["points"] = []
    for point in data["points"]:
        one = point["repeats"][0]
        repeats = [{**one, "repeat": n, RATE: one[RATE] * by} for n, by in enumerate(factors, 1)]
        found["points"].append(summarise_repeats(repeats))
    return found


def table_of(servers, limits=LIMITS):
    """(header, rows) of the points of an experiment with these servers."""
    return serving_points.points_table(summarise_experiment(servers, limits))


def texts_of(servers, limits=LIMITS, name="x"):
    """The sentences of an experiment with these servers."""
    blocks = serving.experiment_blocks(name, summarise_experiment(servers, limits))
    return [block[1] for block in blocks if block[0] == "text"]


def tables(blocks):
    """[(header, rows)] of the tables, those in folds too."""
    for block in blocks:
        if block[0] == "table":
            yield block[1], block[2]
        elif block[0] == "fold":
            yield from tables(block[2])


# What the client counted


def test_published_points_are_by_the_servers_count():
    lengths = read_json(REPO / "results/reference/h200-lengths/bench/lengths/vllm/points.json")
    for point in lengths["points"]:
        assert 1.03 < point["client_output_tokens"] / point["output_tokens"] < 1.05
        assert point["client_itl_ms_avg"] < 0.97 * point["itl_ms_avg"]
        # A user's tokens come one after the other.
        assert point["per_user_tokens_per_second"] == pytest.approx(1000 / point["itl_ms_avg"], rel=0.02)
    assert "was +3.2% to +4.2% off in its tokens" in serving.conditions(summarise_experiment({"vllm": lengths}, None))


def test_equal_counts_need_no_correction():
    bf16 = read_json(PUBLISHED / "bench/bf16/vllm/points.json")
    assert all(point["client_itl_ms_p50"] == point["itl_ms_p50"] for point in bf16["points"])
    assert "off in its tokens" not in serving.conditions(summarise_experiment({"vllm": bf16}, None))


# Limits


def test_a_point_has_its_share_of_limit_and_tokens_per_joule(int4):
    header, rows = table_of({"vllm": int4}, LIMITS)
    first = dict(zip(header, rows[0], strict=True))
    # By hand: a step at 640 positions reads 3.60 GB of weights and 0.34 GB of keys and values at 4.47 TB/s: 0.88 ms.
    assert 0.22 < 264.47 / (1000 / 0.88) < 0.24 and first["of the limit"] == "23%"
    assert (first["load"], first["tokens/s"], first["tokens/J"]) == ("c=1", "264.47", "0.7821")


def test_no_point_of_the_published_run_is_above_its_limit():
    limits = read_json(PUBLISHED / "limits/limits.json")
    for path in PUBLISHED.glob("bench/*/*/points.json"):
        data = read_json(path)
        for point in data["points"]:
            limit = point_limit(data, point, limits)
            assert point["output_tokens_per_second"] < limit["tokens_per_second"]
            assert point["itl_ms_p50"] > limit["itl_ms"]
            assert point["per_user_tokens_per_second"] < limit["per_user_tokens_per_second"]


def test_a_point_above_its_limit_blames_a_busy_machine(int4):
    busy = LIMITS | {"bytes_per_second": LIMITS["bytes_per_second"] / 10}
    texts = texts_of({"vllm": int4}, busy)
    assert "More than 100 %: the limit was measured while other programs used the machine." in texts
    quiet = texts_of({"vllm": int4}, LIMITS)
    assert not [text for text in quiet if "More than 100 %" in text]


def test_the_limit_is_that_of_all_gpus_that_share_the_model(int4):
    one = point_limit(int4, int4["points"][0], LIMITS)
    int4["server_command"].append("--tensor-parallel-size=2")
    two = point_limit(int4, int4["points"][0], LIMITS)
    assert two["tokens_per_second"] == pytest.approx(2 * one["tokens_per_second"])


@pytest.mark.parametrize("change", [{"weights_format": None}, {"weights_format": "gguf"}, {"kv_format": None}])
def test_a_format_that_nobody_knows_has_no_limit_and_no_share(int4, change):
    assert point_limit(int4 | change, int4["points"][0], LIMITS) is None
    header, rows = table_of({"vllm": int4 | change}, LIMITS)
    assert {row[header.index("of the limit")] for row in rows} == {"—"}


def test_guessed_tokens_have_no_such_limit(int4):
    assert point_limit(int4, int4["points"][0], LIMITS)
    int4["server_command"].append('--speculative-config={"method": "ngram"}')
    assert point_limit(int4, int4["points"][0], LIMITS) is None


def test_fp8_has_no_limit_on_a_machine_where_it_was_not_measured(int4):
    fp8 = int4 | {"weights_format": "fp8"}
    assert point_limit(fp8, int4["points"][0], LIMITS)
    assert point_limit(fp8, int4["points"][0], LIMITS | {"fp8_flops_per_second": None}) is None


# Repeats, and what is not valid


def test_three_repeats_have_an_interval_in_table_and_figure(int4):
    data = three_times(int4, 0.9, 1.0, 1.1)
    _, rows = table_of({"vllm": data}, LIMITS)
    assert rows[0][2] == "264.47 [238.03, 290.92]" and rows[0][-2:] == ["3 of 3", "yes"]
    (series,) = serving_points.series_of(summarise_experiment({"vllm": data}, LIMITS))
    assert series["points"][0]["intervals"]["tokens_per_second"] == pytest.approx([238.03, 290.92], abs=0.01)


def test_the_table_counts_the_tries_that_the_certificate_refused(int4):
    first = int4["points"][0]["repeats"][0]
    first["refused_tries"] = [first | {"valid": False}]
    _, rows = table_of({"vllm": int4}, LIMITS)
    assert [row[-2] for row in rows[:2]] == ["1 of 1, 1 refused before", "1 of 1"]


def test_an_invalid_point_is_grey_and_not_compared(walked):
    data = walked | {"settings": walked["settings"] | {"variants": ["published"]}}
    _, rows = table_of({"vllm": data}, None)
    grey = [isinstance(row, Grey) for row in rows]
    assert grey == [not point["valid"] for point in walked["points"]] and True in grey and False in grey
    assert rows[0][-1].startswith("no: 0 requests before those that count")
    assert html_table(["x"] * len(rows[0]), rows, ()).count('<tr class="grey">') == grey.count(True)
    invalid = walked["points"][0]
    assert compare(invalid, walked["points"][-1], RATE, 0.0, ("a", "b")) is None


# The servers beside each other


def beside(first, *others):
    """(rows by (server, load), sentences) of a comparison."""
    blocks = list(serving.comparison(summarise_experiment({"vllm": first} | dict(others), None)))
    ((_, rows),) = tables(blocks)
    return {tuple(row[:2]): row[2:4] for row in rows}, blocks[-1][1].splitlines()


def test_the_fastest_setting_is_named_with_its_ratio(int4):
    base = three_times(int4, 0.99, 1.0, 1.01)
    quick, slow = three_times(int4, 1.19, 1.2, 1.21), three_times(int4, 0.79, 0.8, 0.81)
    rows, words = beside(base, ("vllm-slow", slow), ("vllm-quick", quick))
    assert rows["vllm-quick", "c=64"] == ["1.200 [1.178, 1.222]", "vllm-quick higher"]
    assert rows["vllm-slow", "c=64"][1] == "vllm higher"
    assert words[0] == "c=1: vllm-quick delivers the most tokens a second, 1.200 times vllm."


def test_what_lies_within_the_noise_of_equal_runs_is_no_winner(int4):
    rows, words = beside(three_times(int4, 0.9, 1.0, 1.1), ("vllm-quick", three_times(int4, 1.0, 1.05, 1.1)))
    assert rows["vllm-quick", "c=1"][1] == "cannot be told apart"
    assert words[0] == "c=1: no other server that gives the same answers delivers more than vllm."


def test_one_repeat_names_no_winner(int4):
    rows, words = beside(int4, ("vllm-quick", int4))
    assert rows["vllm-quick", "c=1"] == ["1.000", "no verdict: fewer than 3 repeats"]
    assert words[0] == "c=1: no verdict on the fastest, for that needs three repeats."


def test_a_search_on_a_busy_machine_names_no_winner():
    servers = {server: read_json(CPU / f"bench/search/{server}/points.json") for server in ("vllm", "vllm-ngram")}
    blocks = list(serving.experiment_blocks("search", summarise_experiment(servers, None)))
    (_, points), (_, ratios), *_ = tables(blocks)
    assert {row[-2] for row in points} == {"1 of 3"}  # of each load, one repeat passed its checks
    assert {row[3] for row in ratios} == {"no verdict: fewer than 3 repeats"}
    assert [b[1] for b in blocks if b[0] == "text"][-1].endswith("on the fastest, for that needs three repeats.")
    (fold,) = [block for block in blocks if block[0] == "fold" and "vllm-ngram" in block[1]]
    reasons = [row[2] for row in list(tables([fold]))[1][1]]
    assert "the first third of the requests took 4.71 s each, the last 1.9 s (medians)" in reasons


@pytest.mark.parametrize("change", ["weights", "guesses"])
def test_other_weights_or_random_guesses_win_no_search(int4, change):
    quick = three_times(int4, 1.19, 1.2, 1.21)
    if change == "weights":
        quick["weights_format"] = "fp8"
    else:
        quick["server_command"] = ['--speculative-config={"method": "ngram"}']
    _, words = beside(three_times(int4, 0.99, 1.0, 1.01), ("vllm-other", quick))
    assert set(words) == {f"c={n}: no other server that gives the same answers delivers more than vllm."
                          for n in (1, 8, 16, 32, 64)}  # fmt: skip


def test_acceptance_rates_stand_below_the_figures(int4):
    int4["server_command"].append('--speculative-config={"method": "ngram"}')
    unknown = texts_of({"vllm-ngram": int4}, None, "search")
    assert "vllm-ngram guesses tokens; how many of them were right is not measured." in unknown
    for point in int4["points"]:
        point["guessed_tokens"] = 0
    none = texts_of({"vllm-ngram": int4}, None, "search")
    assert "vllm-ngram looks for guesses, but found none to make: nothing here repeated itself." in none
    for point in int4["points"]:
        point |= {"guessed_tokens": 1000, "guessed_right": 0.934}
    told = texts_of({"vllm-ngram": int4}, None, "search")
    (words,) = [one for one in told if "guessed" in one]
    assert words.startswith("Of the tokens that vllm-ngram guessed these were right: 93% at c=1, 93% at c=8, ")
    assert words.endswith("; what random weights write is no text: a trained model's shares are others.")


@pytest.mark.parametrize("servers", [("vllm-batch-4", "vllm-batch-8", "vllm-batch-16"), ("vllm", "vllm-ngram")])
def test_ratios_divide_by_the_plain_or_lowest_server(tmp_path, int4, servers):
    for server in servers:
        write_json(tmp_path / f"bench/batch/{server}/points.json", int4)
    assert list(read_experiments(tmp_path)["batch"]) == list(servers)


def test_the_noise_is_how_far_a_repeat_lies_from_its_own_median(int4):
    assert noise([three_times(int4, 0.9, 1.0, 1.2)], RATE) == pytest.approx(0.2)
    assert noise([int4], RATE) == 0.0


# The walk


def test_the_walk_says_what_each_step_changes_and_what_that_does(walked):
    blocks = list(client_ablation.ablation(summarise_experiment({"vllm": walked}, None)))
    ((header, rows),) = tables(blocks)
    steps = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(steps) == ["published", "completions", "prompts", "pinned", "warm", "corrected"]
    changes = [steps[variant]["what changes"] for variant in list(steps)[1:]]
    assert changes == ["endpoint chat → completions", "prompts synthetic → unique", "pinned false → true",
                       "warmup_requests 0 → 2", "requests_per_stream 2 → 4; min_requests 10 → 8"]  # fmt: skip
    rate = {point["variant"]: point["output_tokens_per_second"] for point in walked["points"]}
    assert rows[1][3] == f"{rate['completions'] / rate['published'] - 1:+.1%}"
    # The chat template adds tokens to every prompt: the server's count gives it away.
    assert "the server counted 94.00 input tokens a request, 64 were asked for" in steps["published"]["valid"]
    assert blocks[0][1].endswith("With fewer than 3 repeats nobody can tell a change from noise.")


def test_a_step_within_the_noise_says_so(walked):
    ((_, rows),) = tables(
        client_ablation.ablation(summarise_experiment({"vllm": three_times(walked, 0.5, 1.0, 2.0)}, None))
    )
    assert rows[1][3].endswith(" (within the noise)")
    ((_, rows),) = tables(
        client_ablation.ablation(summarise_experiment({"vllm": three_times(walked, 0.999, 1.0, 1.001)}, None))
    )
    assert rows[1][3].endswith("%")


# The validity checks


def test_the_validity_table_gives_reasons_of_failed_checks(walked):
    (fold,) = validity.validity(summarise_experiment({"vllm": walked}, None))
    verdicts = [check["verdict"] for point in walked["points"] for check in point["repeats"][0]["checks"]]
    counts = ", ".join(f"{verdicts.count(one)} {one}" for one in ("pass", "fail", "unknown"))
    assert fold[1] == f"Validity of vllm: {counts}"
    (header, rows), (_, reasons) = tables([fold])
    table = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert table["warm-up"]["c=4 published"] == "fail" and table["warm-up"]["c=4 corrected"] == "pass"
    assert table["GPU alone"]["c=4 corrected"] == "unknown"
    (warm_up,) = [row for row in reasons if row[0] == "warm-up"]
    assert warm_up[1:3] == ["fail", "0 requests before those that count"]
    assert warm_up[3].startswith("c=4 published (1); c=4 completions (1)")


def test_repeats_that_disagree_say_how_many_failed():
    assert validity.verdict_cell(["pass", "fail", "pass"]) == "fail (1 of 3)"
    assert validity.verdict_cell(["unknown", "pass"]) == "unknown (1 of 2)"
    assert validity.verdict_cell(["pass"] * 3) == "pass" and validity.verdict_cell([]) == "—"


# The chapter


def summary_of(folder, value=1, name="h200"):
    return summarise({name: folder}, {claim: value for *_, ids in PUBLISHED_POINTS for claim in ids if claim})


def chapter(folder):
    return list(serving.serving({"runs": {}}, summary_of(folder)))


def test_published_points_stand_beside_a_cards_limit(tmp_path):
    write_json(tmp_path / "limits/limits.json", {**LIMITS, "device": "NVIDIA H100 80GB HBM3", "bytes_per_second": 3e12})
    text, (_, header, rows) = serving.published_points(summary_of(tmp_path, 171.29, "h100")["published"])
    assert "of the card in h100" in text[1]
    # For a token of one user 3.36 GB of matrices in 4 bits, 0.26 GB of head and 0.17 GB of keys and values: 1.27 ms.
    assert dict(zip(header, rows[0], strict=True))["of the limit"] == "22%"
    _, (_, header, rows) = serving.published_points(summary_of(H200, 171.29)["published"])
    assert {row[header.index("of the limit")] for row in rows} == {"—"}


def test_the_published_chapter_names_partial_and_random_parts():
    blocks = chapter(H200)
    markdown = to_markdown("Title", blocks)
    assert "int4, vllm: partial, the budget ended after 5 of 18 measurements." in markdown
    assert "Random weights choose their experts almost evenly" in markdown
    assert read_json(H200 / "run.json")["note"].split(";")[0] in markdown
    captions = [block[3] for block in blocks if block[0] == "figure"]
    assert len(captions) == 4 and all("Random weights." in caption for caption in captions)
    assert "<svg" in to_html("Title", "", blocks, ())


def test_the_figures_draw_every_load_with_the_limit():
    drawn = {block[1]: block[2] for block in chapter(H200) if block[0] == "figure"}
    (series,) = drawn["serving-gpt-oss-h200"].data["series"]
    assert [point["concurrency"] for point in series["points"]] == [1, 4, 16, 64, 256]
    assert [point["concurrency"] for point in series["limit"]] == [1, 4, 16, 64, 256]
    panels = drawn["serving-gpt-oss-h200"].figure.axes
    assert [[line.get_linestyle() for line in axes.get_lines()] for axes in panels] == [["-", ":"], ["-"], ["-", ":"]]
    (axes,) = drawn["pareto-gpt-oss-h200"].figure.axes
    assert [text.get_text() for text in axes.texts] == ["1", "4", "16", "64", "256"]
    json.dumps(drawn["pareto-gpt-oss-h200"].data)


def test_the_limit_of_each_load_has_the_colour_of_its_line():
    drawn = {block[1]: block[2] for block in chapter(REPO / "results/reference/h200-lengths") if block[0] == "figure"}
    (axes,) = drawn["pareto-lengths-h200"].figure.axes
    colours = {
        style: [line.get_color() for line in axes.get_lines() if line.get_linestyle() == style] for style in "-:"
    }
    assert len(set(colours[":"])) == 3 and set(colours[":"]) == set(colours["-"])


def test_an_invalid_point_is_a_grey_cross_apart_from_the_line(int4):
    int4["points"][2] |= {"valid": False, "invalid_reasons": ["other programs used 9 of 16 cores"]}
    drawings = serving_points.draw_figures("x", summarise_experiment({"vllm": int4}, None))
    axes = next(drawings)[2].figure.axes[0]
    line, cross = axes.get_lines()
    assert list(line.get_xdata()) == [1, 8, 32, 64] and list(cross.get_xdata()) == [16]
    assert (cross.get_marker(), cross.get_color()) == ("x", "#999999")


def test_no_run_says_what_measures(tmp_path):
    command = "containers/run venv:tools dvc repro bench@base"
    assert chapter(tmp_path)[-1] == ("text", f"Not measured yet. `{command}` measures it.")
