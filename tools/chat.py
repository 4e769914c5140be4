"""
Talk to the fine-tuned model in the terminal: python -m tools.chat [ADAPTER] [--once TEXT] [--server NAME [--url URL]]

Loads the model, or asks a server that runs (`make serve` starts one).

in:   params.yaml                               profile, chat (how answers are sampled), finetune (the variants)
      results/<profile>/base_model/             the model
      results/<profile>/dataset/metrics.json    the template and the system prompt that it is asked with
      results/<profile>/finetune/ADAPTER/       the adapter, and what it was trained with
Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import signal
import sys
import time
import warnings

from lib.core.stage import UserError, load_yaml, read_json, read_params, results, run
from lib.model.answer import with_adapter
from lib.model.load import load_to_answer
from lib.streaming.triton import Text
from lib.text.templates import prompt_text
from lib.training.config import Finetune, with_variant
from stages.chat import Chat, answer
from tools import remote
from tools.terminal import enter, in_front, pictured, say, say_dim, show, talk

HISTORY = "Each question is answered on its own: the model was trained on single turns and is shown no earlier ones."
KEYS = "Ctrl-C stops an answer. Ctrl-C or Ctrl-D at the prompt ends the talk."


def read_words():
    """The command line: adapter, and once (None: talk)."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.chat",
        description=f"Talk to the fine-tuned model. {HISTORY} {KEYS}",
        epilog="Sampling: section chat of params.yaml, its seed set anew for each answer. "
        "With make: make chat ADAPTER=qlora; make chat SERVER=vllm; make chat ONCE='猫は好き?' ($ is written $$).",
    )
    parser.add_argument(
        "adapter",
        nargs="?",
        default="lora",
        metavar="ADAPTER",
        help="lora (default), qlora, another variant such as lora-published, or none: the base model alone",
    )
    parser.add_argument("--once", metavar="TEXT", help="answer this one question and end; stdout holds the answer only")
    parser.add_argument("--server", metavar="NAME", help="ask a running server: " + ", ".join(remote.ADDRESSES))
    parser.add_argument("--url", help="where that server is, if not on this machine's usual port")
    return parser.parse_args()


def choose(adapter):
    """(method, adapter folder or None, template) to load and to ask with; UserError says what makes what is missing."""
    dvc_repro = "`containers/run venv:tools dvc repro"
    template = "corrected"
    if adapter == "none":
        method, folder = "lora", None  # the base as LoRA has it: bf16
    else:
        try:
            method, p = with_variant(read_params(Finetune), adapter)
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


class Stopped(Exception):
    """Ended by Ctrl-C between two tokens, where the model is in no half-done state."""


class Stream:
    """Takes the tokens of one answer from `generate` as they are made and hands whole characters on to `write`.

    What `write` got is, put together, the stripped text of all tokens.
    """

    def __init__(self, tokenizer, write):
        # Not cleaned up, which moves spaces that were written already: "do n" becomes "don't".
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        self.text, self.write = Text(lambda ids: tokenizer.decode(ids, **plain)), write
        self.ids, self.times, self.stopped = None, [], False

    def put(self, value):
        if self.ids is None:  # the first call brings the prompt
            self.ids = []
        else:
            self.ids += value.tolist()
            self.times.append(time.monotonic())
            if new := self.text.of(self.ids):
                self.write(pictured(new))
        if self.stopped:
            raise Stopped

    def end(self):
        """Nothing is left: a character that was cut through is none of the answer's."""

    def stop(self, *signal_and_frame):
        self.stopped = True


def as_sentence(times, begun, stopped, cut):
    """The measurements of one answer; times: when each token came, end of sequence included, on begun's clock (s)."""
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
    from transformers.utils.logging import set_verbosity_error

    # These libraries' notes are for those who program with them; here somebody talks.
    set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    model, tokenizer = load_to_answer(results("base_model") / "model", method)
    return with_adapter(model, folder) if folder else model.eval(), tokenizer


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
    say_dim(as_sentence(stream.times, begun, stream.stopped, cut))


def from_model(method, folder, p):
    """(what answers one prompt for a script, what answers one in a talk), with the model loaded here."""
    model, tokenizer = load(method, folder)

    def once(text):
        ask(model, tokenizer, text, p, Stream(tokenizer, show))
        print()

    return once, lambda text: answer_in_terminal(model, tokenizer, text, p)


def from_server(words, folder, p):
    """The same two with a running server."""
    adapter = None if folder is None else words.adapter
    client = remote.connect(words.server, words.url, adapter, folder)

    def once(text):
        if remote.reply(client, text, adapter, p)["stopped"]:
            sys.exit(130)

    return once, lambda text: remote.reply(client, text, adapter, p)


def main():
    words = read_words()
    p = read_params(Chat)
    method, folder, template = choose(words.adapter)
    images = load_yaml("containers/images.yaml")["images"]
    enter(images["client" if words.server else "pytorch"], words.once is None, "tools.chat")

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` is no error
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="replace")
    base = read_json(results("base_model") / "metrics.json")
    system = read_json(results("dataset") / "metrics.json")["system_prompt"]
    where = f"{words.server} serves " if words.server else ""
    say(f"{where}{base['name']} with {f'the adapter {folder}' if folder else 'no adapter'}, template {template}")
    if base["weights"] == "random":
        say("Its weights are random: its answers mean nothing.")

    def as_prompt(question):
        # Bytes that are no text in the terminal's encoding become question marks.
        return prompt_text(template, system, question.encode("utf-8", "replace").decode())

    if words.server:
        once, reply = from_server(words, folder, p)
    else:
        once, reply = from_model(method, folder, p)
    if words.once is not None:
        once(as_prompt(words.once))
        return
    say(f"{HISTORY}\n{KEYS}")
    with in_front():
        talk(lambda question: reply(as_prompt(question)))


if __name__ == "__main__":
    run(main)
