"""What comes of one request: the events of its stream with their times, its token counts, or its error."""

import time
from array import array
from dataclasses import dataclass, field

from hasten.core.errors import HastenError
from hasten.core.text import shortened

_LONGEST_MESSAGE = 300


class RequestError(HastenError):
    """A request that failed; `kind` is what failures are counted by, such as `HTTP 429`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(shortened(" ".join(message.split()), _LONGEST_MESSAGE))
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream."""

    is_output: bool = False
    """Whether it is about the output, even where it has no text (yet)."""
    text: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    """Output tokens of the request up to here."""
    new_tokens: int = 0
    """Output tokens since the event before; for servers that count so."""


@dataclass(slots=True)
class Record:
    """The measured times of one request, in seconds of `time.perf_counter`, and what was counted."""

    due: float
    """When it was scheduled. Without a rate: when it might be sent, because another had ended."""
    ready: float = 0.0
    """When it might be sent: due, and below the maximum concurrency."""
    sent: float = 0.0
    """Just before a connection was looked for."""
    times: "array[float]" = field(default_factory=lambda: array("d"))
    """Of the events with text; of all output events, where none has text."""
    last: float = 0.0
    """Of the last output event."""
    end: float = 0.0
    """Of the stream, or of the failure."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt: str = ""
    """The prompt, where its tokens were not counted by the server."""
    output: str = ""
    """The text, where its tokens were not counted by the server."""
    error: str = ""
    """Kind of the failure; empty for a request that was answered."""
    message: str = ""

    def fail(self, error: RequestError) -> None:
        """Note why the request failed."""
        self.end = time.perf_counter()
        self.error, self.message = error.kind, str(error)


class Reply:
    """The stream of one request while it arrives."""

    def __init__(self) -> None:
        self.times = array("d")
        self._blank_times = array("d")
        self._pieces: list[str] = []
        self._last = 0.0
        self._counted = 0
        self._input_tokens: int | None = None
        self._output_tokens: int | None = None

    def take(self, now: float, event: Event) -> None:
        """Note an event that arrived at a time."""
        if event.is_output:
            self._last = now
            if event.text:
                self.times.append(now)
                self._pieces.append(event.text)
            else:
                self._blank_times.append(now)
        self._counted += event.new_tokens
        if event.output_tokens is not None:
            self._output_tokens = event.output_tokens
        if event.input_tokens is not None:
            self._input_tokens = event.input_tokens

    @property
    def text(self) -> str:
        """The output so far."""
        return "".join(self._pieces)

    def write(self, record: Record, prompt: str | list[int]) -> None:
        """Complete the record of an answered request; RequestError where the stream had no output."""
        record.times = self.times or self._blank_times
        if not record.times:
            raise RequestError("empty stream", "the stream ended without any output")
        record.last = self._last
        record.end = time.perf_counter()
        record.output_tokens = self._counted or self._output_tokens
        if record.output_tokens is None:
            record.output = self.text
        record.input_tokens = self._input_tokens
        if record.input_tokens is None:
            if isinstance(prompt, str):
                record.prompt = prompt
            else:
                record.input_tokens = len(prompt)
