"""
Looking never hurts measuring: an observer's question that fails gives None, which is unknown in the validity checks.
"""


def attempt(question, *words):
    """The answer to a question, or None after any exception: a process gone, a broken /proc, a silent driver."""
    try:
        return question(*words)
    except Exception:
        return None
