"""The closed set of verdicts and of evidence, each with its definition. Pages, report and tests read them from here."""

CONTRADICTED = "contradicted by its own source"
VERDICTS = {
    "reproduced": "A run under the claim's conditions gives the printed figure within the tolerance, or shows the "
    "conclusion. Without a run: facts that the claim does not state itself (a model's shape, a count) give the figure.",
    "direction only": "The effect has the claim's sign, not its size; or it shows on a card that is not the writeup's.",
    "not reproduced": "A run under the claim's conditions gives another figure or the opposite conclusion.",
    CONTRADICTED: "The writeup prints figures or commands that exclude each other.",
    "confirmed by source": "The pinned source of the tool, the cited paper or a test of this repository says the same.",
    "refuted by source": "The pinned source of the tool, the cited paper or a test of this repository says otherwise.",
    "inconsistent": "The printed figure breaks an identity with another printed figure, or exceeds the card's limit.",
    "consistent": "The printed figure agrees with the writeup's other figures and with what the card can do. "
    "That excludes slips of the pen; it does not measure the claim.",
    "estimate agrees": "NVIDIA's kernel measurements, added up for this load, give the figure within the tolerance.",
    "estimate disagrees": "NVIDIA's kernel measurements, added up for this load, give another figure.",
    "opinion": "No run can decide it. It is left out of every share.",
    "not comparable": "A run has the figure, under other conditions.",
    "not measured": "No run has the figure. The reason names the one command that would give it.",
}

CARD, OTHER_CARD, CPU = "measured on the writeup's card", "measured on another card", "measured on a CPU"
EVIDENCE = {
    CARD: "A run on the GPU that the writeup names.",
    OTHER_CARD: "A run on another GPU, or the writeup names none.",
    CPU: "A run on a machine without a GPU.",
    "predicted": "Computed from the model's shape and the operations of a step, without running it.",
    "computed": "Arithmetic on a shape, on counts, or on the writeup's own figures.",
    "own text": "Two places of the writeup itself.",
    "source": "A line of a pinned source, or a section of a cited paper.",
    "test": "A test of this repository.",
    "estimated": "Added up from NVIDIA's measured kernels.",
    "none": "No evidence.",
}

# A verdict of an earlier group goes before one of a later group; inside a group the better evidence goes first.
ORDER = (
    ("reproduced", "direction only", "not reproduced", CONTRADICTED),
    ("confirmed by source", "refuted by source"),
    ("inconsistent",),
    ("estimate agrees", "estimate disagrees"),
    ("consistent",),
    ("opinion",),
    ("not comparable",),
    ("not measured",),
)
MEASURED = ORDER[0]
UNANSWERED = ("not comparable", "not measured")


def group(verdict):
    """The place of a verdict's group in ORDER."""
    return next(place for place, verdicts in enumerate(ORDER) if verdict in verdicts)


def rank(outcome):
    """Sort key: the group, the evidence, the verdict, a figure before none, then the fewest unmet conditions."""
    return (
        group(outcome["verdict"]),
        list(EVIDENCE).index(outcome["evidence"]),
        list(VERDICTS).index(outcome["verdict"]),
        outcome["measured"] is None,
        len(outcome.get("unmet", ())),
    )
