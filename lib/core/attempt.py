"""
Looking never hurts measuring: an observer's question that fails gives None, which is unknown in the validity checks.
"""


def attempt(question, *words):
    """What a question gives, or None, whatever it meets: a process gone, a broken /proc, a driver that is silent."""
    try:
        return question(*words)
    except Exception:
        return None
