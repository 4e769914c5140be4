"""
The measures of style: MEASURES by language, functions of an Answer whose docstring is the definition that every table
shows. A measure is a number, or None if the answer holds nothing to count.

A sentence ends at 。！？!? outside a quotation, at a full stop before white space, or with its line. The last piece of
an answer that was cut is no sentence; what is not about sentences takes the text that is there. Japanese is counted in
characters, white space being none, and English in words.
"""

import re
import statistics
from dataclasses import dataclass
from itertools import pairwise

END = re.compile(r"[。！？!?]+(?![」』）)])|(?<!\d)\.(?=[\"”’')]*(?:\s|$))|\n+")
KANA = re.compile(r"[\u3041-\u30ff]")
# Not 私立, 私的 and the like; 自分 is "oneself" as often as "I"; おれ and ぼく in kana stand inside words (しおれる).
FIRST_PERSON = re.compile(r"私(?![立的鉄語服有])|わたくし|わたし|あたし|僕|俺")
# The tail after a sentence's verb: particles, then end marks and closing quotes.
REST = r"(?:か|ね|よ|が|から|とも|のに|けれども?)*[。！？!?.…」』）)]*$"
POLITE = re.compile(
    r"(?:です|ます|でした|ました|ません|でしょう|ましょう|ください|下さい|なさい|ますまい|いらっしゃい)" + REST
)
EXPLAINING = re.compile(r"(?:(?<!も)の|(?<!せ)ん)(?:です|でした|でしょう)" + REST)  # neither ものです nor ませんでした
# distinct-n falls with length: all are counted over as many characters or words, which 95 % of the datasets' have.
WINDOW, WORDS = 40, 20
WORD = re.compile(r"\w+(?:['’-]\w+|[.,]\d+)*")
I = re.compile(r"\b(?:I|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself)\b")  # noqa: E741
HEDGE = re.compile(
    r"\b(?:perhaps|somehow|rather|quite|a little|at least|after all|on the whole|of course|you know|you see|it seems|"
    r"if I may|I (?:think|suppose|believe|confess|fear|feel|admit|expect|am afraid|am sure|should say))\b",
    re.IGNORECASE,
)


@dataclass
class Answer:
    text: str
    cut: bool  # at max_new_tokens, before the model ended it


def characters(text):
    """The text without white space."""
    return "".join(text.split())


def language(texts):
    """ "ja" where most of the texts hold kana, otherwise "en"."""
    return "ja" if 2 * sum(bool(KANA.search(text)) for text in texts) > len(texts) else "en"


def sentences(answer):
    """The finished sentences; a piece without any letter or digit is none."""
    ends = [0, *(match.end() for match in END.finditer(answer.text))] + ([] if answer.cut else [len(answer.text)])
    pieces = [answer.text[begin:end].strip() for begin, end in pairwise(ends)]
    return [piece for piece in pieces if WORD.search(piece)]


def japanese_sentences(answer):
    """The finished sentences without white space."""
    return [characters(sentence) for sentence in sentences(answer)]


def share(things, wanted):
    """The share of the things for which `wanted` is true; None of no things."""
    return sum(bool(wanted(thing)) for thing in things) / len(things) if things else None


def mean(numbers):
    """Their mean; None of no numbers."""
    return statistics.fmean(numbers) if numbers else None


def commas_per_character(answer):
    """The marks 、 divided by all characters."""
    return share(characters(answer.text), "、".__eq__)


def sentence_characters(answer):
    """Mean length of the finished sentences in characters, end marks included."""
    return mean([len(sentence) for sentence in japanese_sentences(answer)])


def first_person_sentences(answer):
    """Share of the finished sentences that hold 私, わたくし, わたし, あたし, 僕 or 俺."""
    return share(japanese_sentences(answer), FIRST_PERSON.search)


def polite_endings(answer):
    """Share of the finished sentences that end in a form of です or ます, ください or なさい; particles may follow."""
    return share(japanese_sentences(answer), POLITE.search)


def explaining_endings(answer):
    """Share of the finished sentences that end in のです or んです or a form of them; particles may follow."""
    return share(japanese_sentences(answer), EXPLAINING.search)


def distinct(parts, n, window):
    """Different runs of n parts divided by all, over the first `window` parts; None where there are fewer."""
    runs = [tuple(parts[at : at + n]) for at in range(window - n + 1)]
    return len(set(runs)) / len(runs) if len(parts) >= window else None


def distinct_1(answer):
    """Different characters among the first 40, divided by 40; an answer of fewer characters has no value."""
    return distinct(characters(answer.text), 1, WINDOW)


def distinct_2(answer):
    """Different pairs of neighbours in the first 40 characters, divided by 39; an answer of fewer has no value."""
    return distinct(characters(answer.text), 2, WINDOW)


def answer_characters(answer):
    """Characters of the answer; of a cut one, of what there is."""
    return float(len(characters(answer.text)))


def cut(answer):
    """1 where the answer was cut at max_new_tokens, 0 where it ended by itself: the mean is the share cut."""
    return float(answer.cut)


def words(text):
    """The words of a text in small letters; cannot and isn't are one each."""
    return [word.lower() for word in WORD.findall(text)]


def commas_per_word(answer):
    """Commas divided by all words."""
    count = len(words(answer.text))
    return answer.text.count(",") / count if count else None


def sentence_words(answer):
    """Mean length of the finished sentences in words."""
    return mean([len(words(sentence)) for sentence in sentences(answer)])


def sentences_with_i(answer):
    """Share of the finished sentences that hold I, me, my, mine or myself."""
    return share(sentences(answer), I.search)


def hedged_sentences(answer):
    """Share of the finished sentences with a hedge such as perhaps, somehow, a little, you know, I think or I fear."""
    return share(sentences(answer), HEDGE.search)


def distinct_words_1(answer):
    """Different words among the first 20, divided by 20; an answer of fewer words has no value."""
    return distinct(words(answer.text), 1, WORDS)


def distinct_words_2(answer):
    """Different pairs of neighbours in the first 20 words, divided by 19; an answer of fewer words has no value."""
    return distinct(words(answer.text), 2, WORDS)


def answer_words(answer):
    """Words of the answer; of a cut one, of what there is."""
    return float(len(words(answer.text)))


MEASURES = {
    "ja": (
        commas_per_character,
        sentence_characters,
        first_person_sentences,
        polite_endings,
        explaining_endings,
        distinct_1,
        distinct_2,
        answer_characters,
        cut,
    ),
    "en": (
        commas_per_word,
        sentence_words,
        sentences_with_i,
        hedged_sentences,
        distinct_words_1,
        distinct_words_2,
        answer_words,
        cut,
    ),
}
