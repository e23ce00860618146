"""The process of the page: its flags, what is refused at the door, without Gradio."""

import asyncio
import importlib.util
import socket

import pytest

from jdm.errors import InvalidValue
from jdm.serve import server
from jdm.serve.options import ServeOptions


def test_without_gradio_one_sentence_says_how_to_install_it(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a)
    )
    done = run("serve", "--checkpoint=digits")
    assert done.returncode == 1
    assert done.stderr == "jdm serve: the page needs gradio: pip install 'jdm[serve]'\n"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--port=70000", "--port=70000 must be between 0 and 65535"),
        ("--port=web", "--port='web' must be a whole number"),
        ("--queue=0", "--queue=0 must be positive"),
    ],
)
def test_wrong_flags_are_refused_first(run, flag, said):
    done = run("serve", "--checkpoint=nowhere", flag)
    assert done.returncode == 2 and done.stderr == f"jdm serve: {said}\n"


def test_a_port_in_use_and_a_host_of_nobody_are_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidValue, match="cannot be used: .*--port=0 takes a free one"):
            server.check_port(ServeOptions(port=taken.getsockname()[1]))
    with pytest.raises(InvalidValue, match="host='nobody' is not an address"):
        server.check_port(ServeOptions(host="nobody", port=0))


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_is_local(host, local):
    assert server.is_local(host) is local


def answer(path: str, body: bytes = b"", length: bool = True) -> tuple[int, dict, int]:
    """(status, headers, bytes that the application read) of one request through the Door."""
    sent, read = [], 0

    async def app(scope, receive, send):
        nonlocal read
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            read += len(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    pieces = [body[i : i + 10] for i in range(0, len(body), 10)] or [b""]

    async def receive():
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode())] if length else []
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(server.Door(app, most=100)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), read


def test_the_door_refuses_large_requests_and_closed_paths():
    assert answer("/gradio_api/queue/join", b"x" * 100)[::2] == (200, 100)
    assert answer("/gradio_api/queue/join", b"x" * 101)[::2] == (413, 0)
    assert answer("/gradio_api/queue/join", b"x" * 1000, length=False)[2] <= 100
    for path in ("/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/upload", "/proxy=x"):
        assert answer(path, b"x")[::2] == (403, 0)


def test_every_answer_forbids_calls_to_other_servers():
    for path in ("/", "/gradio_api/upload"):
        policy = answer(path)[1][b"content-security-policy"].decode()
        assert "default-src 'self'" in policy and "connect-src 'self'" in policy
        assert "http" not in policy and "*" not in policy
