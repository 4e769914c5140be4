"""A point is valid when it did the work that was asked for, on a machine that did nothing else."""

import json

import pytest
from bench_inputs import POINT, RECORDED
from conftest import every_input

from lib.bench.validity import check_point, steady
from lib.core.stage import UserError
from lib.serving import servers
from lib.serving.clients import GenaiPerf
from lib.serving.monitor import Monitor, cores


def single_requests(tmp_path, name, change=lambda text: text):
    """A folder with what genai-perf kept of 12 requests to a server that answers in 80 ms; of the drifting one the
    first six took 280 ms."""
    (tmp_path / "profile_export.json").write_text(change((RECORDED / f"{name}_profile_export.json").read_text()))
    return GenaiPerf().latencies(tmp_path)


@pytest.mark.parametrize(("name", "verdict", "first"), [("steady", "pass", 0.08), ("drifting", "fail", 0.28)])
def test_a_server_that_gets_faster_during_a_point_is_found(tmp_path, name, verdict, first):
    latencies = single_requests(tmp_path, name)
    assert len(latencies) == 12 and latencies[0] == pytest.approx(first, rel=0.05)
    assert steady(latencies)[0] == verdict


def test_requests_count_in_the_order_of_sending(tmp_path):
    def backwards(text):
        data = json.loads(text)
        data["experiments"][0]["requests"].reverse()
        return json.dumps(data)

    assert single_requests(tmp_path, "drifting", backwards) == single_requests(tmp_path, "drifting")


def test_a_record_of_single_requests_that_is_cut_short_is_named(tmp_path):
    with pytest.raises(UserError, match=r"profile_export\.json: not whole"):
        single_requests(tmp_path, "steady", lambda text: text[:5000])


ASKED = {"requests": 8, "warmup": 4, "concurrency": 4, "input_tokens": 64, "output_tokens": 32}
COUNTED = {"input_tokens": 768.0, "output_tokens": 384.0, "requests": 12.0, "cache_hits": 0.0}
SEEN = {"client_cores": 0.1, "other_cores": 0.1, "gpu_slowed": [], "gpu_sm_mhz": 1980.0, "gpu_watts": 650.0,
        "gpu_celsius_max": 61, "gpu_capped": 0.25}  # fmt: skip


def checked(point=None, asked=None, counted=None, seen=None, other_processes=(), latencies=(2.0,) * 12, beside=0):
    """{check: (verdict, reason)} of a good point on a GPU with some of its figures changed."""
    counted = COUNTED | (counted or {})
    counted = {name: value for name, value in counted.items() if value is not None}
    point, asked, seen = POINT | (point or {}), ASKED | (asked or {}), SEEN | (seen or {})
    checks = check_point(point, asked, counted, seen, other_processes, latencies, beside)
    return {one["check"]: (one["verdict"], one["reason"]) for one in checks}


def test_what_was_asked_on_a_quiet_gpu_passes_every_check():
    assert {verdict for verdict, _ in checked().values()} == {"pass"}


@pytest.mark.parametrize(
    ("change", "check", "verdict", "reason"),
    [
        ({"point": {"requests": 6}}, "requests", "fail", "2 of 8 requests failed"),
        ({"counted": {"output_tokens": 372.0}}, "output length", "fail",
         "the server counted 31.00 output tokens a request, 32 were asked for"),
        # genai-perf tokenises the text again, which may have another spelling: the server's count decides.
        ({"point": {"output_tokens": 30.0}}, "output length", "pass",
         "the server counted 32.00 output tokens a request, 32 were asked for"),
        ({"point": {"output_tokens": 30.0}, "counted": {"output_tokens": None}}, "output length", "fail",
         "the client counted 30.00 output tokens a request, 32 were asked for"),
        ({"counted": {"input_tokens": 900.0}}, "input length", "fail",
         "the server counted 75.00 input tokens a request, 64 were asked for"),
        ({"point": {"input_tokens": None}, "counted": {"input_tokens": None}}, "input length", "unknown",
         "neither server nor client counted input tokens"),
        ({"counted": {"cache_hits": 320.0}}, "prefix cache", "fail", "320 prompt tokens came from the prefix cache"),
        ({"counted": {"cache_hits": None}}, "prefix cache", "unknown",
         "the server does not tell how many prompt tokens it had cached"),
        ({"latencies": (3.0,) * 4 + (2.0,) * 8}, "steady", "fail",
         "the first third of the requests took 3 s each, the last 2 s (medians)"),
        ({"latencies": (2.0,) * 8 + (2.51,) * 4}, "steady", "fail", "the first third"),
        ({"latencies": (2.4,) * 4 + (9.0, 2.0, 2.0, 2.0) * 2}, "steady", "pass", "the first third"),
        ({"latencies": (9.0, 2.0) * 5}, "steady", "unknown", "10 requests are too few to tell, 12 are enough"),
        ({"latencies": None}, "steady", "unknown", "the client kept no single requests"),
        ({"asked": {"warmup": 0}}, "warm-up", "fail", "0 requests before those that count"),
        ({"point": {"requests_per_second": 1.2}}, "concurrency", "fail",
         "2.40 requests in flight on average, 4 were asked for"),
        ({"point": {"request_latency_ms_avg": None}}, "concurrency", "unknown", "the client gave no latency"),
        ({"seen": {"client_cores": 900.0}}, "client", "fail", "the client used 900.00 of"),
        ({"seen": {"other_cores": 900.0}}, "other programs", "fail", "other programs used 900.00 of"),
        ({"seen": {"other_cores": None}}, "other programs", "unknown", "nothing tells what other programs used"),
        ({"other_processes": [4711]}, "GPU alone", "fail", "processes 4711 were on the GPU before"),
        ({"other_processes": None}, "GPU alone", "unknown", "no NVIDIA GPU"),
        ({"beside": 3}, "GPU alone", "pass", "nothing was on the GPU before; 3 other servers on it had no load"),
        ({"seen": {"gpu_slowed": ["hardware thermal slowdown"]}}, "GPU clocks", "fail",
         "hardware thermal slowdown; 1980 MHz, 650 W, at most 61 °C"),
        ({"seen": {"gpu_slowed": None}}, "GPU clocks", "unknown", "no NVIDIA GPU"),
    ],
)  # fmt: skip
def test_each_way_to_measure_something_else_is_found_and_named(change, check, verdict, reason):
    found = checked(**change)
    assert found[check][0] == verdict and found[check][1].startswith(reason)
    assert [name for name, (other, _) in found.items() if other != "pass"] in ([check], [])


def test_a_card_at_its_power_limit_is_valid_and_says_so():
    assert checked()["GPU clocks"][1].endswith("at its power limit in 25% of the samples")


def sample(seconds, running, client, server, everything):
    return {"seconds": seconds, "running": running, "client_cpu_seconds": client, "server_cpu_seconds": server,
            "all_cpu_seconds": everything}  # fmt: skip


def test_cpu_time_is_split_into_client_server_and_others():
    monitor = Monitor(servers.Vllm("base", every_input()), list)
    monitor.samples = [
        sample(0, 0, 0, 0, 0), sample(1, 2, 5, 1, 8), sample(2, 4, 5.25, 2.5, 10), sample(3, 4, 5.5, 4, 12),
        sample(9, 0, 15, 4, 30),  # the client works up its results: no load any more
    ]  # fmt: skip
    seen = monitor.summary()
    assert (seen["client_cores"], seen["server_cores"], seen["other_cores"]) == (0.25, 1.5, 0.25)
    assert seen["batch_max"] == 4 and seen["batch_mean"] == pytest.approx(10 / 3)
    assert seen["gpu_watts"] is None and seen["queue_mean"] is None


def test_a_load_shorter_than_two_looks_leaves_the_cpu_unmeasured():
    assert cores([sample(0, 1, 0, 0, 0)]) == {"client_cores": None, "server_cores": None, "other_cores": None}
