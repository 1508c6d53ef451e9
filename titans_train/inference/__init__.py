"""Generation with a carried memory state: constant memory per token, states that outlive the process.

Read once, ask many, in Python:

    model, _ = load_checked(find("runs/mine", []))              # titans_train.inference.source
    book, _ = read_stream(model, tokenizer, open("book.txt", "rb"))   # any length, in pieces
    save_reading(Path("book.safetensors"), book, model)
    book = load_reading(Path("book.safetensors"), model)        # later: checked against the model's parameters
    asked = read_rows(model, [list(tokenizer.encode([q])[0]) for q in questions], book)   # none sees another
    generate_rows(model, asked, 100, Sampler(temperature=0), generators, take)            # side by side

`read` and `generate` do the same for one text, token by token; `TextStream` makes text of tokens as they come.
"""

from titans_train.inference.batch import generate_rows
from titans_train.inference.command import main
from titans_train.inference.incoming import read_stream
from titans_train.inference.sampler import Sampler
from titans_train.inference.sampling import Reading, generate, read, read_rows, sample_text
from titans_train.inference.state_file import load_reading, save_reading
from titans_train.inference.text import TextStream

__all__ = [
    "Reading", "Sampler", "TextStream", "generate", "generate_rows", "load_reading", "main", "read", "read_rows",
    "read_stream", "sample_text", "save_reading",
]  # fmt: skip
