"""
Rows of the dataset: read, check, write.
"""

import json
from pathlib import Path

from lib.core.stage import UserError


def read_rows(path):
    """Every row of a JSON Lines file as {"instruction", "output"}; UserError names all bad lines."""
    rows, bad, seen = [], [], {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Notepad and Excel write
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it, nothing was written") from None
    except OSError as error:
        raise UserError(f"{path}: not readable as a file ({error.strerror}); it holds one JSON object a line") from None
    if text.lstrip().startswith("["):
        raise UserError(f"{path}: it is a JSON array; write one object a line instead (jq -c '.[]')")
    lines = text.removesuffix("\n").split("\n")
    # Not splitlines(): a text may hold U+2028 or U+0085, which JSON allows and which end no row.
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        row, reason = read_row(line)
        if reason is None:
            key = (row["instruction"], row["output"])
            reason = f"the same as line {seen[key]}" if key in seen else None
            seen.setdefault(key, number)
        if reason:
            bad.append(f"line {number}: {reason}")
        rows.append(row)
    if bad:
        more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
        raise UserError(f"{path}: {'; '.join(bad[:5])}{more}; mend or remove the rows, nothing was written")
    if not rows:
        raise UserError(f"{path}: it has no rows; nothing was written")
    return rows


def read_row(line):
    """(row, None), or (None, what is wrong with the line)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg})"
    if not isinstance(row, dict):
        return None, "not an object with instruction and output"
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            return None, f"{key} is missing or not text"
        if not row[key].strip():
            return None, f"{key} is empty"
    return {"instruction": row["instruction"], "output": row["output"]}, None


def write_jsonl(path, lines):
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
