"""A tokenizer of 26 tokens, one for each letter."""


class Letters:
    """Tokenizer that raises IndexError for unknown ids, as sentencepiece does.

    Attributes:
        lengths: lengths of the texts that were tokenized.
    """

    chat_template = None
    eos_token_id = None

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.lengths.append(len(text))
        return {"input_ids": [ord(character) % 26 for character in text if character != " "]}

    def decode(self, ids: list[int], **_: object) -> str:
        if any(token >= 26 for token in ids):
            raise IndexError("piece id is out of range.")
        return "".join(chr(97 + token) for token in ids)
