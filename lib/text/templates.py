"""
Prompt formats: chatml, llama-2, and the writeup's own.
"""

# (prompt, completion). `published` is the writeup's string: its literal <s> comes on top of the BOS that a Llama
# tokenizer adds, so the model learns with two and is asked with one. In the other two a text holds exactly one BOS:
# Llama's tokenizer adds it, SmolLM2's does not and its chat format begins with it (<|im_start|>).
TEMPLATES = {
    "published": ("<s>[INST] <<SYS>> {system} <</SYS>> {instruction} [/INST]", " {output} </s>"),
    "llama-2": ("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{instruction} [/INST]", " {output}"),
    "chatml": (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "{output}",
    ),
}


def prompt_text(template, system, instruction):
    """The text that asks `instruction`: the same for training, chat and every client."""
    return TEMPLATES[template][0].format(system=system, instruction=instruction)


def completion_text(template, output):
    """The text that the model learns to answer; the trainer adds EOS where the template does not."""
    return TEMPLATES[template][1].format(output=output)
