"""
One page of everything: what ran, the verdicts, fine-tuning, memory, chat, style, serving and the whole ledger, out of
result files alone.

in:   results/<profile>/claims/claims.json, results/<profile>/serving_summary/summary.json, data/report/style.css,
      the small files of every run
out:  results/<profile>/report/index.html   one file: style and figures inside, no script, nothing to load
      results/<profile>/report/report.md    the same content in the same order, with the figures as .svg beside it
"""

from dataclasses import dataclass
from pathlib import Path

from lib.claims.kinds import VERDICTS
from lib.core.stage import read_json, read_params, results, run, write_json
from lib.report import (
    answers,
    client_accuracy,
    estimate,
    kv_cache,
    limits,
    memory,
    serving,
    speedups,
    streaming_and_adapters,
    training,
)
from lib.report.overview import how_to, verdicts, what_ran, whole_ledger
from lib.report.page import to_html, to_markdown

FIGURE_COMMAND = "make report"


@dataclass
class Report:
    title: str


def blocks_of(ledger, summary):
    """The whole report as blocks."""
    claims = {claim["id"]: claim for claim in ledger["claims"]}
    return [
        *what_ran(ledger, summary),
        *verdicts(ledger),
        *training.finetuning(ledger, claims),
        *memory.memory(ledger, claims),
        *answers.chat(ledger),
        *answers.style(ledger),
        *serving.serving(summary),
        *limits.limits(ledger),
        *estimate.estimates(ledger, triton_points(summary)),
        *streaming_and_adapters.streaming(ledger),
        *streaming_and_adapters.multilora(ledger),
        *speedups.speedups(ledger, claims),
        *kv_cache.kv_cache(ledger),
        *client_accuracy.client_accuracy(ledger),
        *whole_ledger(ledger),
        *how_to(ledger),
    ]


def triton_points(summary):
    """[(users, tokens/s)] that the writeup prints for Triton."""
    points = summary["published"]["points"]
    return [
        (point["concurrency"], point["numbers"][0])
        for point in points
        if point["server"].startswith("Triton") and point["numbers"][0]
    ]


def write_report(title, ledger, summary, out):
    """index.html, report.md and the figures that the latter links to."""
    blocks = blocks_of(ledger, summary)
    out.mkdir(parents=True, exist_ok=True)
    for _, name, drawn, caption in (block for block in blocks if block[0] == "figure"):
        (out / f"{name}.svg").write_text(drawn.svg.replace("<svg", '<svg style="background:#fff;color:#1b1f24"', 1))
        (out / f"{name}.png").write_bytes(drawn.png())
        write_json(out / f"{name}.json", {"shows": caption, "command": FIGURE_COMMAND, **drawn.data})
    (out / "report.md").write_text(to_markdown(title, blocks))
    (out / "index.html").write_text(to_html(title, Path("data/report/style.css").read_text(), blocks, VERDICTS))


def main():
    p = read_params(Report)
    ledger = read_json(results("claims") / "claims.json")
    summary = read_json(results("serving_summary") / "summary.json")
    write_report(p.title, ledger, summary, results("report"))
    print(f"report: {results('report') / 'index.html'}")


if __name__ == "__main__":
    run(main)
