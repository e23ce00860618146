"""The process of the page: its temporary folder, what is refused at the door, its end."""

import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from jdm.errors import Failure, InvalidValue
from jdm.joint import Joint
from jdm.messages import STDOUT, say
from jdm.serve.jobs import MODEL
from jdm.serve.options import ServeOptions

# Paths of Gradio that this page does not use: they write uploads to files, and fetch URLs.
CLOSED = ("/upload", "/file=", "/file/", "/proxy=", "/stream", "/component_server", "/deep_link")
PREFIX = "/gradio_api"
PATIENCE = 30  # seconds that a computation may take to end when the server is ended
# The browser asks no other server, whatever Gradio's pages name.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door:
    """Refuses requests that are too large or for closed paths, and adds HEADERS to answers.

    An ASGI middleware. most: bytes of a request.
    """

    def __init__(self, app: Callable, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        path = scope["path"].removeprefix(PREFIX)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if path.startswith(CLOSED):
            await _refuse(answered, 403, "This page takes no files here.")
        elif not length.isdigit() or int(length) > self.most:
            await _refuse(answered, 413, f"A request may have {self.most:,} bytes at most.")
        else:
            await self.app(scope, self._counted(receive), answered)

    def _counted(self, receive: Callable) -> Callable:
        """The same for requests that do not say their length."""
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= self.most else {"type": "http.disconnect"}

        return counted


async def _refuse(send: Callable, status: int, text: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})


def check_port(options: ServeOptions) -> None:
    """Raises InvalidValue where the address or the port cannot be listened on."""
    if options.host != "localhost":
        try:
            ipaddress.ip_address(options.host)
        except ValueError:
            said = "is not an address, such as 127.0.0.1 or 0.0.0.0"
            raise InvalidValue("host", options.host, said) from None
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            text = f"cannot be used: {error.strerror}"
            raise InvalidValue("port", options.port, text, "--port=0 takes a free one") from None


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def prepare(folder: str) -> None:
    """Is called before Gradio is imported: it reads these variables then."""
    if "gradio" in sys.modules and os.environ.get("GRADIO_TEMP_DIR") is None:
        raise Failure("Gradio was imported before its temporary folder was chosen")
    os.environ["GRADIO_TEMP_DIR"] = folder
    for name, value in {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_SSR_MODE": "False",
        "GRADIO_MCP_SERVER": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ[name] = value


def serve(joint: Joint, path: str, report: str | None, options: ServeOptions) -> None:
    """Serves the page until the process is interrupted or terminated.

    path: of the checkpoint, as the user wrote it. report: a folder that jdm eval has written, or
    None. Raises InvalidValue for a host, a port or a report that cannot be used.
    """
    check_port(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="jdm-serve-", ignore_cleanup_errors=True) as folder:
        prepare(folder)
        from jdm.serve import about
        from jdm.serve.page import build

        say("preparing the page: its first programs are compiled")
        facts = about.facts_of(joint, path, report)
        blocks = build(joint, path, facts, options)
        where = launch(blocks, options)
        try:
            say(f"the page is at {where} (end it with Ctrl-C)", STDOUT)
            threading.Event().wait()
        except KeyboardInterrupt:
            say("the page is closed", STDOUT)
        finally:
            blocks.close(verbose=False)
            # A thread that computes while Python ends would abort the process.
            MODEL.acquire(timeout=PATIENCE)


def launch(blocks: Any, options: ServeOptions) -> str:
    """Starts the server in threads of its own; returns the address of the page."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from jdm.serve.page import CSS, THEME

    # A picture in base64, a region, and the rest of a request.
    door = Middleware(Door, most=2 * options.megabytes * 2**20)
    # Another site cannot reach the page under a name of its own (DNS rebinding). Starlette does not
    # know the addresses of IPv6.
    names = ["localhost", "127.0.0.1"]
    known = is_local(options.host) and ":" not in options.host
    host = [Middleware(TrustedHostMiddleware, allowed_hosts=names)] if known else []
    _, where, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port or _free_port(options.host),
        app_kwargs=dict(middleware=[*host, door]),
        theme=THEME,
        css=CSS,
        share=False,
        quiet=True,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=0,
        state_session_capacity=1000,
        prevent_thread_lock=True,
    )
    return where
