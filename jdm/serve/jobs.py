"""Work for visitors: one job at a time, in a thread, with its progress, and cancelled on demand."""

import contextvars
import functools
import html
import json
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jdm.errors import Failure, InvalidValue
from jdm.messages import say
from jdm.serve import show
from jdm.tracking import watched

MODEL = threading.Lock()  # the model computes for one visitor at a time
WAITING = "Waiting: the model computes for one visitor at a time."
WAIT = 0.2  # seconds between looks at a job
_SAID = InvalidValue, Failure, FloatingPointError, MemoryError


class Cancelled(Exception):
    """The visitor has stopped the job, or left."""


def followed(job: Callable[[], Any]) -> Iterator[tuple[int, int] | Any]:
    """Yields (done, total) while a job runs in a thread, and its result at last.

    The job is cancelled at its next report of progress where the iterator is closed before.
    """
    stop = threading.Event()
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def report(label: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled
        news.put(("progress", (done, total)))

    def run() -> None:
        try:
            with MODEL:
                if stop.is_set():
                    return
                with watched(report):
                    news.put(("result", job()))
        except BaseException as error:
            news.put(("error", error))

    # JAX's settings of a thread are those of its context.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = news.get(timeout=WAIT)
            except queue.Empty:
                yield None
                continue
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        stop.set()


def sentence_of(error: Exception, name: str = "") -> str:
    """What a visitor is told: the sentence of an error that was foreseen; of another one only that
    there was one, and the traceback goes to the server's terminal."""
    if isinstance(error, InvalidValue):
        text = error.sentence(name or error.parameter.replace("_", " "))
        return text[:1].upper() + text[1:] + "."
    if isinstance(error, _SAID):
        return f"{error}."
    say("".join(traceback.format_exception(error)))
    return "This failed for a reason that was not foreseen; the terminal of the server shows it."


def failed(error: Exception) -> str:
    """The same as HTML."""
    return f'<p class="jdm-error" role="alert">{html.escape(sentence_of(error))}</p>'


def guarded(outputs: int) -> Callable[[Callable], Callable]:
    """A decorator of handlers, functions whose first output is a line of status: an error becomes
    that line, and the other outputs stay as they are. Handlers may be generators."""
    import inspect

    import gradio

    def decorate(handler: Callable) -> Callable:
        def end(error: Exception):
            rest = [gradio.skip() for _ in range(outputs - 1)]
            return (failed(error), *rest) if rest else failed(error)

        @functools.wraps(handler)
        def generator(*inputs):
            try:
                yield from handler(*inputs)
            except Exception as error:
                yield end(error)

        @functools.wraps(handler)
        def function(*inputs):
            try:
                return handler(*inputs)
            except Exception as error:
                return end(error)

        return generator if inspect.isgeneratorfunction(handler) else function

    return decorate


def connect(
    start: Sequence[Any],
    stop: Any,
    handler: Callable,
    inputs: Sequence,
    outputs: Sequence,
    name: str,
) -> None:
    """Connects a handler that computes with the model to what starts it and to the button Stop.

    The first output is the line of status: it says at once that the work waits, and at its end that
    it was stopped, if it was. The browser sets both. The server could not: Gradio finishes a
    function of the button Stop before it cancels anything, and an update that is on its way by then
    would replace what the function said.

    start: the events, such as go.click. name: of the handler in the server's API.
    """
    import gradio

    status = outputs[0]
    quick: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")
    gradio.on(
        start, None, None, status, js=f"() => {json.dumps(show.status(WAITING, True))}", **quick
    )
    event = gradio.on(
        start,
        handler,
        inputs,
        outputs,
        show_progress="hidden",
        concurrency_id="model",
        api_name=name,
    )
    for ended in (event.then, event.failure):  # a full queue is a failure, which Gradio explains
        ended(None, status, status, js=show.STOPPED_IF_BUSY, **quick)
    stop.click(None, cancels=[event], **quick)
