"""
The report: a page of answers, a page a chapter, and every claim, out of result files alone.

in:   results/<profile>/claims/claims.json, results/<profile>/serving_summary/summary.json, data/report/,
      the small files of every run
out:  results/<profile>/report/index.html   the answers; style and figures inside, nothing to load, as in every page
      results/<profile>/report/NAME.html    one page a chapter (CHAPTERS)
      results/<profile>/report/claims.html  every claim, with a script that searches, filters and sorts
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
from lib.report.answer_page import answer_page
from lib.report.claims_page import claims_body
from lib.report.overview import how_to, verdicts, what_ran, whole_ledger
from lib.report.page import frame, to_html, to_markdown

FIGURE_COMMAND = "make report"
# The pages in order and what a link calls them.
CHAPTERS = {
    "index": "Answers",
    "verdicts": "Verdicts",
    "finetuning": "Fine-tuning",
    "memory": "Memory",
    "answers": "Chat and style",
    "serving": "Serving",
    "limits": "Limits and estimates",
    "streaming": "Streaming and adapters",
    "speedups": "Speed-ups",
    "client-accuracy": "Load clients",
    "runs": "Runs and commands",
    "claims": "All claims",
}


@dataclass
class Report:
    title: str


def chapters_of(ledger, summary):
    """{page: its blocks}, in the order of CHAPTERS."""
    claims = {claim["id"]: claim for claim in ledger["claims"]}
    return {
        "index": list(answer_page(ledger, summary)),
        "verdicts": list(verdicts(ledger)),
        "finetuning": [*answers.opening(ledger), *training.finetuning(ledger, claims)],
        "memory": list(memory.memory(ledger, claims)),
        "answers": [*answers.chat(ledger), *answers.style(ledger)],
        "serving": list(serving.serving(ledger, summary)),
        "limits": [*limits.limits(ledger), *estimate.estimates(ledger, summary)],
        "streaming": [*streaming_and_adapters.streaming(ledger), *streaming_and_adapters.multilora(ledger)],
        "speedups": [*speedups.speedups(ledger, claims), *kv_cache.kv_cache(ledger)],
        "client-accuracy": list(client_accuracy.client_accuracy(ledger)),
        "runs": [*what_ran(ledger, summary), *how_to(ledger)],
        "claims": list(whole_ledger(ledger)),
    }


def write_report(title, ledger, summary, out):
    """The pages, report.md, and the figures that the latter links to."""
    chapters = chapters_of(ledger, summary)
    out.mkdir(parents=True, exist_ok=True)
    blocks = [block for chapter in chapters.values() for block in chapter]
    for _, name, drawn, caption in (block for block in blocks if block[0] == "figure"):
        (out / f"{name}.svg").write_text(drawn.svg.replace("<svg", '<svg style="background:#fff;color:#1b1f24"', 1))
        (out / f"{name}.png").write_bytes(drawn.png())
        write_json(out / f"{name}.json", {"shows": caption, "command": FIGURE_COMMAND, **drawn.data})
    (out / "report.md").write_text(to_markdown(title, blocks))
    for name, chapter in chapters.items():
        (out / f"{name}.html").write_text(page_of(name, title, ledger, chapter))


def page_of(name, title, ledger, blocks):
    """One HTML page, with links to the others."""
    links = [(text, None if page == name else f"{page}.html") for page, text in CHAPTERS.items()]
    title = title if name == "index" else f"{CHAPTERS[name]}: {title}"
    style = Path("data/report/style.css").read_text()
    if name == "claims":
        return frame(title, style, links, claims_body(ledger, Path("data/report/claims.js").read_text()))
    return to_html(title, style, blocks, VERDICTS, links)


def main():
    p = read_params(Report)
    ledger = read_json(results("claims") / "claims.json")
    summary = read_json(results("serving_summary") / "summary.json")
    write_report(p.title, ledger, summary, results("report"))
    print(f"report: {results('report') / 'index.html'}")


if __name__ == "__main__":
    run(main)
