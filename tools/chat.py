"""
Talk to the fine-tuned model in the terminal: python -m tools.chat [ADAPTER] [--once TEXT]

in:   params.yaml                               profile, chat (how answers are sampled), finetune (the variants)
      results/<profile>/base_model/             the model
      results/<profile>/dataset/metrics.json    the template and the system prompt that it is asked with
      results/<profile>/finetune/ADAPTER/       the adapter, and what it was trained with
Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import time

from stages.chat import Chat, answer
from stages.dataset import prompt_text
from stages.finetune import Finetune, with_arm
from stages.stage import UserError, load_yaml, read_json, read_params, results, run
from stages.training import load_to_answer

HISTORY = "Each question is answered on its own: the model was trained on single turns and is shown no earlier ones."
KEYS = "Ctrl-C stops an answer. Ctrl-C or Ctrl-D at the prompt ends the talk."
NO_PICTURE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but tab and line feed


def read_words():
    """The command line: adapter, and once (None: talk)."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.chat",
        description=f"Talk to the fine-tuned model. {HISTORY} {KEYS}",
        epilog="Sampling: section chat of params.yaml, its seed set anew for each answer. "
        "With make: make chat ADAPTER=qlora; make chat ONCE='猫は好き?' (a $ is written $$ there).",
    )
    parser.add_argument(
        "adapter",
        nargs="?",
        default="lora",
        metavar="ADAPTER",
        help="lora (default), qlora, a variant with its arm as in lora-published, or none: the base model alone",
    )
    parser.add_argument("--once", metavar="TEXT", help="answer this one question and end; stdout holds the answer only")
    return parser.parse_args()


def choose(adapter):
    """(method, adapter folder or None, template) to load and to ask with; UserError says what makes what is missing."""
    dvc_repro = "`containers/run venv:tools dvc repro"
    template = "corrected"
    if adapter == "none":
        method, folder = "lora", None  # the base as LoRA has it: bf16
    else:
        try:
            method, p = with_arm(read_params(Finetune), adapter)
        except UserError as error:
            raise UserError(f"{error}; ADAPTER=none is the base model alone") from None
        folder = results("finetune") / adapter / "adapter"
        if not (folder / "adapter_config.json").exists():
            listed = "" if adapter in p.variants else f"put {adapter} into finetune.variants of params.yaml, then "
            raise UserError(f"{folder}: there is no adapter; {listed}{dvc_repro} finetune@{adapter}` makes it")
        # Not params.yaml's: that may have changed since.
        template = read_json(folder.parent / "metrics.json")["settings"]["template"]
    for path in (results("base_model") / "metrics.json", results("dataset") / "metrics.json"):
        if not path.exists():
            raise UserError(f"{path}: there is no such file; {dvc_repro} dataset` makes it")
    data = read_json(results("dataset") / "metrics.json")
    return method, folder, data["template"] if template == "corrected" else template


def enter(image, terminal):
    """Become this very command in the environment `image`; returns where that has happened already."""
    if os.environ.get("REPO_IMAGE") != image:
        words = ["containers/run", *(["--terminal"] if terminal else []), image]
        os.execv(words[0], [*words, "python", "-m", "tools.chat", *sys.argv[1:]])


class Stopped(Exception):
    """Ended by Ctrl-C between two tokens, where the model is in no half-done state."""


class Stream:
    """Takes the tokens of one answer from `generate` as they are made and hands whole characters on to `write`.

    Not transformers' TextStreamer: it keeps kana back until a space, a line's end or a kanji comes, so that a Japanese
    sentence arrives at once. What `write` got is, put together, the stripped text of all tokens.
    """

    def __init__(self, tokenizer, write):
        self.tokenizer, self.write = tokenizer, write
        self.ids, self.times, self.shown, self.stopped = None, [], 0, False

    def put(self, value):
        if self.ids is None:  # the first call brings the prompt
            self.ids = []
        else:
            self.ids += value.tolist()
            self.times.append(time.monotonic())
            # Not cleaned up, which moves spaces that were written already: "do n" becomes "don't".
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A character of several tokens is U+FFFD until its last one is there.
            text = text.rstrip("\ufffd").strip()
            # With byte fallback the characters before an unfinished one turn to U+FFFD too: text is shorter then.
            if len(text) > self.shown:
                self.write(NO_PICTURE.sub("\ufffd", text[self.shown :]))
                self.shown = len(text)
        if self.stopped:
            raise Stopped

    def end(self):
        """Nothing is left: a character that was cut through is none of the answer's."""

    def stop(self, *signal_and_frame):
        self.stopped = True


def as_sentence(times, begun, stopped, cut):
    """What was measured of one answer; times: when each token came, end of sequence included, on begun's clock (s)."""
    words = [f"{len(times)} token{'' if len(times) == 1 else 's'}"]
    if times:
        words.append(f"the first after {times[0] - begun:.2f} s")
    if len(times) > 1 and times[-1] > times[0]:
        words.append(f"then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    return ", ".join(words + ["stopped"] * stopped + ["cut at chat.max_new_tokens"] * cut)


def ask(model, tokenizer, text, p, stream):
    """Generate the continuation of a prompt into a Stream, until it ends or is stopped."""
    with contextlib.suppress(Stopped):
        answer(model, tokenizer, [text], p, stream)


def load(method, folder):
    """(model, tokenizer) with the adapter of that folder, if any."""
    from peft import PeftModel

    model, tokenizer = load_to_answer(method)
    return (PeftModel.from_pretrained(model, folder) if folder else model).eval(), tokenizer


def show(piece):
    print(piece, end="", flush=True)


def say(text):
    print(text, file=sys.stderr, flush=True)


def answer_in_terminal(model, tokenizer, text, p):
    """One answer on stdout, one dim line with its measures on stderr; Ctrl-C ends the answer."""
    stream = Stream(tokenizer, show)
    before = signal.signal(signal.SIGINT, stream.stop)
    begun = time.monotonic()
    try:
        ask(model, tokenizer, text, p, stream)
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)
    cut = len(stream.times) == p.max_new_tokens and stream.ids[-1] != tokenizer.eos_token_id
    sentence = as_sentence(stream.times, begun, stream.stopped, cut)
    say(f"\x1b[2m{sentence}\x1b[0m" if sys.stderr.isatty() else sentence)


@contextlib.contextmanager
def in_front():
    """Inside, Ctrl-C reaches this process alone. `make` in the same group would take it as its own end, and say so."""
    group = os.getpgrp()
    try:
        others = os.tcgetpgrp(0) == group != os.getpid()
    except OSError:  # no terminal
        others = False
    if not others:
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else giving the terminal back would stop this process
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z: the shell knows `make` only, and could not wake this one
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    try:
        yield
    finally:
        os.tcsetpgrp(0, group)


def talk(reply):
    """Read questions until Ctrl-D or Ctrl-C and hand each to `reply`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines, wide characters too
    person = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        while True:
            question = input("> " if person else "")
            if question.strip():
                reply(question)
    except (EOFError, KeyboardInterrupt):
        if person:
            print()


def main():
    words = read_words()
    p = read_params(Chat)
    method, folder, template = choose(words.adapter)
    enter(load_yaml("containers/images.yaml")["images"]["pytorch"], terminal=words.once is None)

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` is no error
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="replace")
    base = read_json(results("base_model") / "metrics.json")
    system = read_json(results("dataset") / "metrics.json")["system_prompt"]
    say(f"{base['name']} with {f'the adapter {folder}' if folder else 'no adapter'}, template {template}")
    if base["weights"] == "random":
        say("Its weights are random: its answers mean nothing.")
    model, tokenizer = load(method, folder)

    def as_prompt(question):
        # Bytes that are no text in the terminal's encoding become question marks.
        return prompt_text(template, system, question.encode("utf-8", "replace").decode())

    if words.once is not None:
        ask(model, tokenizer, as_prompt(words.once), p, Stream(tokenizer, show))
        print()
        return
    say(f"{HISTORY}\n{KEYS}")
    with in_front():
        talk(lambda question: answer_in_terminal(model, tokenizer, as_prompt(question), p))


if __name__ == "__main__":
    run(main)
