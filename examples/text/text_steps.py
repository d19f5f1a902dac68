"""The steps of the text example: sentences, tokens, and an embedder that needs no model."""

import hashlib
import re
from pathlib import Path

import numpy as np

from servinggraph import InvalidRequest

HERE = Path(__file__).parent
SIZE = 384  # length of an embedding, in both graphs
LENGTHS = (16, 32, 64, 128, 256)  # tokens are padded to one of these: only rows of equal length share a batch
MOST_SENTENCES = 1000


def sentences(body):
    """Give the sentences of a text, one by one: what stands behind this in the graph runs for each of them."""
    text = body.get("text") if isinstance(body, dict) else body
    if not isinstance(text, str):
        raise InvalidRequest('expected text, or a JSON object {"text": "..."}')
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]
    if len(found) > MOST_SENTENCES:
        raise InvalidRequest(f"the text has {len(found)} sentences, at most {MOST_SENTENCES} are embedded at once")
    for sentence in found:
        yield {"sentence": sentence}


def hashing(value):
    """Embed a sentence without a model: each word and each three letters of it fall into places of a vector.

    Sentences that share words come out similar; that is all it knows of language.
    """
    vector = np.zeros(SIZE, np.float32)
    for word in re.findall(r"\w+", value["sentence"].lower()):
        padded = f"<{word}>"
        for part in (word, *(padded[at : at + 3] for at in range(len(padded) - 2))):
            number = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
            vector[number % SIZE] += 1 if number >> 63 else -1
    length = np.linalg.norm(vector)
    return {"embedding": vector[None] / length if length else vector[None]}


class Tokens:
    """Turns a sentence into the numbers of its word pieces, as the model has learned them."""

    def load(self):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LENGTHS[-1])

    def __call__(self, value):
        ids = self.tokenizer.encode(value["sentence"]).ids
        length = next(length for length in LENGTHS if length >= len(ids))
        padded = np.zeros((1, length), np.int64)
        padded[0, : len(ids)] = ids
        mask = np.zeros((1, length), np.int64)
        mask[0, : len(ids)] = 1
        return {"input_ids": padded, "attention_mask": mask}


def answer(sentence, embedding):
    """Make the item that the caller gets."""
    return {"sentence": sentence, "embedding": embedding[0]}
