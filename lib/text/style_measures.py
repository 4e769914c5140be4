"""
What `style` counts in an answer: MEASURES, functions of an Answer whose docstring is the definition that every table
shows. A measure is a number, or None where the answer holds nothing of what is counted.

A sentence ends at 。！？!? outside a quotation, at a full stop before white space, or with its line. The last piece of
an answer that was cut is no sentence; what is not about sentences takes the text that is there. White space is no
character.
"""

import re
import statistics
from dataclasses import dataclass
from itertools import pairwise

END = re.compile(r"[。！？!?]+(?![」』）)])|(?<!\d)\.(?=\s|$)|\n+")
# Not 私立, 私的 and the like; 自分 is "oneself" as often as "I"; おれ and ぼく in kana stand inside words (しおれる).
FIRST_PERSON = re.compile(r"私(?![立的鉄語服有])|わたくし|わたし|あたし|僕|俺")
# What may follow a sentence's verb: particles, then end marks and closing quotes.
REST = r"(?:か|ね|よ|が|から|とも|のに|けれども?)*[。！？!?.…」』）)]*$"
POLITE = re.compile(
    r"(?:です|ます|でした|ました|ません|でしょう|ましょう|ください|下さい|なさい|ますまい|いらっしゃい)" + REST
)
EXPLAINING = re.compile(r"(?:(?<!も)の|(?<!せ)ん)(?:です|でした|でしょう)" + REST)  # neither ものです nor ませんでした
WINDOW = 40  # distinct-n falls with length: all are counted over as many characters, which 95 % of the dataset's have


@dataclass
class Answer:
    text: str
    cut: bool  # at max_new_tokens, before the model ended it


def characters(text):
    """The text without white space."""
    return "".join(text.split())


def sentences(answer):
    """The finished sentences without white space; a piece without any letter or digit is none."""
    ends = [0, *(found.end() for found in END.finditer(answer.text))] + ([] if answer.cut else [len(answer.text)])
    pieces = [characters(answer.text[begin:end]) for begin, end in pairwise(ends)]
    return [piece for piece in pieces if re.search(r"\w", piece)]


def share(things, wanted):
    """The share of the things for which `wanted` is true; None of no things."""
    return sum(bool(wanted(thing)) for thing in things) / len(things) if things else None


def commas_per_character(answer):
    """The marks 、 divided by all characters."""
    return share(characters(answer.text), "、".__eq__)


def sentence_characters(answer):
    """Mean length of the finished sentences in characters, end marks included."""
    lengths = [len(sentence) for sentence in sentences(answer)]
    return statistics.fmean(lengths) if lengths else None


def first_person_sentences(answer):
    """Share of the finished sentences that hold 私, わたくし, わたし, あたし, 僕 or 俺."""
    return share(sentences(answer), FIRST_PERSON.search)


def polite_endings(answer):
    """Share of the finished sentences that end in a form of です or ます, ください or なさい; particles may follow."""
    return share(sentences(answer), POLITE.search)


def explaining_endings(answer):
    """Share of the finished sentences that end in のです or んです or a form of them; particles may follow."""
    return share(sentences(answer), EXPLAINING.search)


def distinct(text, n):
    """Different runs of n characters divided by all, over the first WINDOW characters; None where there are fewer."""
    head = characters(text)[:WINDOW]
    runs = [head[at : at + n] for at in range(WINDOW - n + 1)]
    return len(set(runs)) / len(runs) if len(head) == WINDOW else None


def distinct_1(answer):
    """Different characters among the first 40, divided by 40; an answer of fewer characters has no value."""
    return distinct(answer.text, 1)


def distinct_2(answer):
    """Different pairs of neighbours in the first 40 characters, divided by 39; an answer of fewer has no value."""
    return distinct(answer.text, 2)


def answer_characters(answer):
    """Characters of the answer; of a cut one, of what there is."""
    return float(len(characters(answer.text)))


def cut(answer):
    """1 where the answer was cut at max_new_tokens, 0 where it ended by itself: the mean is the share cut."""
    return float(answer.cut)


MEASURES = (
    commas_per_character,
    sentence_characters,
    first_person_sentences,
    polite_endings,
    explaining_endings,
    distinct_1,
    distinct_2,
    answer_characters,
    cut,
)
