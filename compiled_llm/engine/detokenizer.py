"""Incremental detokenization: complete characters only, cut at the first stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from compiled_llm.engine.decode_stream import open_stream, strip_marks
from compiled_llm.engine.tokenizer_errors import raise_panic
from compiled_llm.sampling_params import SamplingParams


class Detokenizer:
    """The text of one completion.

    The text is what the tokens add to the prompt's text, so with a sentencepiece tokenizer the
    space before the first word is kept. A character that is incomplete at the end of the prompt
    belongs to the completion; one that is incomplete at the end of the completion is left out. If
    the text contains several stop strings, it is cut at the one that ends first, and at the longest
    of those that end together, so the result does not depend on token boundaries.

    Args:
        tokenizer: the model's tokenizer; its exceptions are passed on.
        params: sampling parameters. `stop`, `include_stop_str_in_output`, `min_tokens` and
            `skip_special_tokens` are read. A stop string counts if it ends after the first
            `min_tokens` tokens.
        prompt_token_ids: token ids of the prompt.
        stop_token_ids: token ids without text, unless `include_stop_str_in_output` is set.

    Attributes:
        num_tokens: number of tokens in the text; the last one is that which completed a stop
            string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._stop_strings = tuple(params.stop or ())
        self._min_tokens = params.min_tokens
        self._max_held = max(map(len, self._stop_strings), default=1) - 1
        self._first_characters = {stop[0] for stop in self._stop_strings}
        self._include_stop = params.include_stop_str_in_output
        self._skipped = frozenset() if self._include_stop else stop_token_ids
        self._stream, self._num_marks = open_stream(
            tokenizer, params.skip_special_tokens, prompt_token_ids
        )
        self._text = ""
        self._num_taken = 0
        self._stopped = False
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """The text so far, of complete characters."""
        return self._text

    def push(self, token_ids: Sequence[int]) -> bool:
        """Append tokens; return True once a stop string was found. Later tokens are ignored."""
        for token in token_ids:
            if self._stopped:
                break
            if token in self._skipped:
                continue
            self.num_tokens += 1
            try:
                new = self._stream.step(token)
            except BaseException as error:
                raise_panic(error)
                raise
            if new and self._num_marks:
                # Marks of the prompt's incomplete character do not belong to the completion.
                new, self._num_marks = strip_marks(new, self._num_marks), 0
            self._text += new
            if new and self.num_tokens > self._min_tokens:
                self._stopped = self._cut(len(new))
        return self._stopped

    def stable_text(self, *, final: bool = False) -> str:
        """Return the text without the characters that may become part of a stop string.

        Args:
            final: whether no more tokens follow, so that all of the text is returned.
        """
        held = 0 if final or self._stopped or self._include_stop else self._num_held()
        return self._text[: len(self._text) - held] if held else self._text

    def take(self, *, final: bool = False) -> str:
        """Return the part of the stable text that the previous calls have not returned."""
        text = self.stable_text(final=final)
        start, self._num_taken = self._num_taken, len(text)
        return text[start:]

    def _cut(self, num_new: int) -> bool:
        """Cut the text at a stop string that ends in its last `num_new` characters, if any."""
        num_old = len(self._text) - num_new
        found = []
        for stop in self._stop_strings:
            start = self._text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if found:
            end, start = min(found)
            self._text = self._text[: end if self._include_stop else start]
        return bool(found)

    def _num_held(self) -> int:
        """Return how many characters at the end of the text are the beginning of a stop string."""
        tail = self._text[-self._max_held :] if self._max_held else ""
        for start, character in enumerate(tail):
            if character in self._first_characters and self._begins_stop(tail[start:]):
                return len(tail) - start
        return 0

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) and stop != text for stop in self._stop_strings)
