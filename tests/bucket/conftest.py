"""A stand-in for Google Cloud Storage on a local port: the part of its JSON API that gcsfs and
tensorstore use. It has the manners of a bucket: an object is whole or not there, nothing is added
to one or renamed, and folders are what names have in common."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class Answer(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, said: str = "", **headers: str):
        super().__init__(status)
        self.status, self.headers = status, headers
        error = {"code": status, "message": said, "errors": [{"message": said}]}
        self.content = json.dumps({"error": error}).encode() if said else b""


class Bucket:
    """The bucket "bucket".

    objects: {name: content}. refused: {(method, pattern of names): status}; the method LIST lists.
    before: called with (method, name) before a request is answered. states: what the bucket held
    after each change, where it is a list.
    """

    page = 3  # names in one page of a list, so that a client that reads one page is found out

    def __init__(self):
        self._lock = threading.Lock()
        self.empty()

    def empty(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.before: Callable[[str, str], None] = lambda method, name: None
        self.states: list[dict[str, bytes]] | None = None
        self._generations: dict[str, int] = {}
        self._last = 1000
        self._uploads: dict[str, tuple[str, dict[str, str], bytes]] = {}  # in parts

    def check(self, method: str, name: str) -> None:
        self.before(method, name)
        for (refused, pattern), status in self.refused.items():
            if refused == method and re.search(pattern, name):
                raise Answer(status, f"me@example.org does not have access to {method} {name}")

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict[str, str]:
        with self._lock:
            self._match(name, query)
            self._last += 1
            self.objects[name], self._generations[name] = content, self._last
            self._changed()
            return self._about(name)

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self._lock:
            self._about(name)
            self._match(name, query)
            del self.objects[name]
            self._changed()

    def get(self, name: str, query: dict[str, str]) -> tuple[dict[str, str], bytes]:
        with self._lock:
            about = self._about(name)
            self._match(name, query)
            return about, self.objects[name]

    def list(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        found: dict[str, dict | None] = {}
        with self._lock:
            for name in sorted(self.objects):
                rest = name[len(prefix) :]
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if delimiter and delimiter in rest:
                    found[prefix + rest.split(delimiter)[0] + delimiter] = None
                else:
                    found[name] = self._about(name)
        names = [name for name in sorted(found) if name > query.get("pageToken", "")]
        page = names[: self.page]
        answer: dict = {"kind": "storage#objects"}
        answer["items"] = [about for name in page if (about := found[name])]
        answer["prefixes"] = [name for name in page if found[name] is None]
        return answer | ({"nextPageToken": page[-1]} if len(names) > len(page) else {})

    def upload(self, query: dict[str, str], body: bytes, headers) -> dict[str, str]:
        if query["uploadType"] == "media":
            name, content = query["name"], body
        elif query["uploadType"] == "multipart":  # what it is called, then what it holds
            boundary = b"\n--" + re.search("boundary=.(.*).$", headers["Content-Type"])[1].encode()
            _, about, content = body.split(b"\n\n", 2)
            name = json.loads(about.partition(boundary)[0])["name"]
            content = content[: content.rindex(boundary)]
        else:  # in parts, of which the last one makes the object
            name = query.get("name") or json.loads(body)["name"]
            self.check("POST", name)
            key = str(len(self._uploads))
            self._uploads[key] = (name, query, b"")
            where = f"http://{headers['Host']}/upload/storage/v1/b/bucket/o?upload_id={key}"
            raise Answer(200, Location=where)
        self.check("POST", name)
        return self.put(name, content, query)

    def part(self, key: str, body: bytes, headers) -> dict[str, str]:
        name, query, content = self._uploads[key]
        self._uploads[key] = (name, query, content := content + body)
        if headers["Content-Range"].endswith("*"):
            raise Answer(308, Range=f"bytes=0-{len(content) - 1}")
        self.check("PUT", name)
        return self.put(name, content, query)

    def _match(self, name: str, query: dict[str, str]) -> None:
        """Raises Answer where a condition of the request does not hold."""
        now = self._generations.setdefault(name, 1) if name in self.objects else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            raise Answer(412, "conditionNotMet")
        if int(query.get("ifGenerationNotMatch", -1)) == now:
            raise Answer(304)

    def _about(self, name: str) -> dict[str, str]:
        if name not in self.objects:
            raise Answer(404, f"No such object: bucket/{name}")
        content, when = self.objects[name], "2026-01-01T00:00:00.000Z"
        about = {"kind": "storage#object", "bucket": "bucket", "name": name}
        about |= {"size": str(len(content)), "timeCreated": when, "updated": when}
        about["generation"] = str(self._generations.setdefault(name, 1))
        return about | {"md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode()}

    def _changed(self) -> None:
        if self.states is not None:
            self.states.append(dict(self.objects))


def answer(bucket: Bucket, method: str, url: str, body: bytes, headers) -> tuple:
    """(status, content, headers) of a request. Raises Answer."""
    path = re.sub("^/(upload|download)/", "/", urlsplit(url).path)
    query = {k: v[0] for k, v in parse_qs(urlsplit(url).query, keep_blank_values=True).items()}
    if not (
        found := re.fullmatch("/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(/rewriteTo/.*)?)?)?", path)
    ):
        raise Answer(400, f"the stand-in does not know {method} {path}")
    if found[1] != "bucket":
        raise Answer(404, "The specified bucket does not exist.")
    if "upload_id" in query:
        return 200, bucket.part(query["upload_id"], body, headers), {}
    if found[2] is None:
        if method == "POST":
            return 200, bucket.upload(query, body, headers), {}
        bucket.check("LIST", query.get("prefix", ""))
        return 200, bucket.list(query), {}
    name = unquote(found[2])
    if found[3]:
        bucket.check("COPY", name)
        to = unquote(found[3].rpartition("/")[2])
        made = bucket.put(to, bucket.get(name, {})[1], query)
        return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": made}, {}
    bucket.check(method, name)
    if method == "DELETE":
        bucket.delete(name, query)
        return 204, b"", {}
    about, content = bucket.get(name, query)
    if query.get("alt") != "media":
        return 200, about | {"mediaLink": f"/download{path}?alt=media"}, {}
    of = {"x-goog-generation": about["generation"]}
    if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or "")):
        return 200, content, of
    start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if start >= len(content):
        raise Answer(416, "the range is not there")
    of["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return 206, content[start : end + 1], of


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, request, client_address):
        """A client that was killed has closed its connection."""


def handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

        def log_message(self, *_):
            pass

        def any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, content, headers = answer(
                    bucket, self.command, self.path, body, self.headers
                )
            except Answer as error:
                status, content, headers = error.status, error.content, error.headers
            if isinstance(content, dict):
                content, headers = (
                    json.dumps(content).encode(),
                    {"Content-Type": "application/json"},
                )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = any

    return Handler


@pytest.fixture(scope="session")
def stand_in():
    """The bucket, which gcsfs and tensorstore find by their settings, in this process and others:
    both remember the server."""
    pytest.importorskip("gcsfs", reason="buckets need the extra gcs")
    bucket = Bucket()
    server = Server(("127.0.0.1", 0), handler(bucket))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    settings |= {"FSSPEC_GCS_TOKEN": "anon", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield bucket
    server.shutdown()


@pytest.fixture
def bucket(stand_in):
    """The bucket, empty."""
    stand_in.empty()
    return stand_in
