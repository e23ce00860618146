"""Jobs: their progress, their end by a visitor, and what a visitor is told of errors."""

import threading

import pytest

from jdm.errors import Failure, InvalidValue
from jdm.serve.jobs import MODEL, Cancelled, failed, followed, sentence_of
from jdm.tracking import Progress, watched


def test_a_job_reports_and_returns():
    def job():
        with Progress(2, "working", "pieces") as progress:
            progress.advance()
            progress.advance()
        return "done"

    seen = [one for one in followed(job) if one is not None]
    assert seen == [(1, 2), (2, 2), "done"]


def test_an_error_of_a_job_is_raised():
    def job():
        raise Failure("no memory")

    with pytest.raises(Failure, match="no memory"):
        list(followed(job))


def test_a_job_that_is_left_ends_at_its_next_report_and_frees_the_model():
    went_on, ended = threading.Event(), threading.Event()
    steps = []

    def job():
        try:
            with Progress(9, "working", "pieces") as progress:
                progress.advance()
                assert went_on.wait(10)
                progress.advance()
                steps.append("after the end")
        except Cancelled:
            ended.set()
            raise

    running = followed(job)
    while next(running) is None:
        pass
    running.close()
    went_on.set()
    assert ended.wait(10) and not steps
    assert MODEL.acquire(timeout=10)
    MODEL.release()


def test_watching_ends_with_its_block():
    seen = []
    with watched(lambda *report: seen.append(report)), Progress(3, "a", "b") as progress:
        progress.advance(2)
    with Progress(3, "a", "b") as progress:
        progress.advance()
    assert seen == [("a", 2, 3)]


def test_a_visitor_sees_sentences_and_no_traceback(capsys):
    error = InvalidValue("seeds", "<b>", "is not a list")
    assert sentence_of(error) == "Seeds='<b>' is not a list."
    assert "<b>" not in failed(error) and "&lt;b&gt;" in failed(error)
    try:
        raise KeyError("/home/secret")
    except KeyError as unforeseen:
        told = failed(unforeseen)
    assert "secret" not in told and "Traceback" not in told
    assert "KeyError: '/home/secret'" in capsys.readouterr().err
