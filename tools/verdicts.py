"""
What a run came to, in three lines: python -m tools.verdicts

in:   results/<profile>/claims/claims.json
"""

from lib.core.stage import read_json, results, run


def main():
    counts = read_json(results("claims") / "claims.json")["counts"]
    print("verdicts: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    print(f"report: {results('report') / 'index.html'}")


if __name__ == "__main__":
    run(main)
