"""A server that speaks what huggingface_hub needs of the hub, on a port of this machine.

Repositories with commits and branches, public and private ones, small files in the commit and large
ones by the protocol of Git LFS. It checks what it is sent: tokens, digests of uploads, the header
of the model card. The library is the real one, with its own setting of the server.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_mine"  # of the user "me"
REPOSITORY = r"/(?P<repo>[\w.-]+/[\w.-]+)"


class Refusal(Exception):
    """An answer that is no success: status, the hub's code of the error, and its body."""

    def __init__(self, status, code="", body=None):
        self.status, self.code, self.body = status, code, body or {}


class Hub:
    """repositories: {"owner/name": {"private", "branches": {name: commit}}}. commits: {commit:
    {path: content}}. asked: "METHOD path" of every request. broken: paths whose requests fail."""

    def __init__(self):
        self.repositories, self.commits, self.large = {}, {}, {}
        self.asked, self.broken = [], ()

    def add(self, name, files, private=False):
        self.repositories[name] = {"private": private, "branches": {}}
        return self.commit(name, "main", files)

    def commit(self, name, branch, files):
        branches = self.repositories[name]["branches"]
        files = {**self.commits.get(branches.get(branch), {}), **files}
        sha = hashlib.sha1(repr((name, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        branches[branch] = sha
        return sha

    def files(self, name, revision="main"):
        branches = self.repositories[name]["branches"]
        sha = branches.get(revision, revision)
        if sha not in self.commits and not (revision == "main" and not branches):
            raise Refusal(404, "RevisionNotFound")
        return sha, self.commits.get(sha, {})


def card_header(content):
    """The YAML between the first two lines of ---, as {key: text} of its plain lines."""
    found = re.match(rb"---\n(.*?)\n---\n", content, re.DOTALL)
    lines = found[1].decode().splitlines() if found else []
    return dict(line.split(": ", 1) for line in lines if re.match(r"\w+: ", line))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if any(part in path for part in hub.broken):
                raise Refusal(400, body={"error": "out of order"})
            for pattern, answer in ROUTES.items():
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    named = found.groupdict()
                    if "repo" in named:
                        self.check_repository(named["repo"])
                    return self.send(*answer(self, hub, body, **named))
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.send(refusal.status, headers, json.dumps(refusal.body).encode())

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_repository(self, name):
        held = self.server.hub.repositories.get(name)
        if held is None or (held["private"] and not self.known):
            raise Refusal(404 if self.known else 401, "RepoNotFound")
        if self.command == "POST" and not (self.known and name.startswith("me/")):
            raise Refusal(403)

    def send(self, status, headers=(), content=b""):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(content)


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def create(handler, hub, body):
    given = json.loads(body)
    name = f"{given.get('organization') or 'me'}/{given['name']}"
    if not handler.known or not name.startswith("me/"):
        raise Refusal(403)
    if name in hub.repositories:
        raise Refusal(409)
    private = given.get("private") or given.get("visibility") == "private"
    hub.repositories[name] = {"private": bool(private), "branches": {}}
    return _json({"url": f"http://{handler.headers['Host']}/{name}"})


def validate(handler, hub, body):
    header = card_header(json.loads(body)["content"].encode())
    if not header or header.get("license", "mit") not in ("mit", "apache-2.0"):
        raise Refusal(400, body={"errors": [{"message": '"license" must be one of mit, …'}]})
    return _json({"errors": [], "warnings": []})


def info(handler, hub, body, repo, revision="main"):
    sha, files = hub.files(repo, revision)
    tags = card_header(files.get("README.md", b""))
    siblings = [{"rfilename": path} for path in files]
    private = hub.repositories[repo]["private"]
    found = {"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []}
    return _json(found | {"library_name": tags.get("library_name")})


def preupload(handler, hub, body, repo, revision):
    hub.files(repo, revision)
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(body)["files"]
    ]
    return _json({"files": modes})


def batch(handler, hub, body, repo):
    objects = []
    for one in json.loads(body)["objects"]:
        upload = {"href": f"http://{handler.headers['Host']}/upload/{one['oid']}"}
        objects.append(one if one["oid"] in hub.large else one | {"actions": {"upload": upload}})
    return _json({"transfer": "basic", "objects": objects})


def upload(handler, hub, body, oid):
    assert hashlib.sha256(body).hexdigest() == oid
    hub.large[oid] = body
    return 200, {}, b""


def commit(handler, hub, body, repo, revision):
    hub.files(repo, revision)
    files = {}
    for line in filter(None, body.split(b"\n")):
        one = json.loads(line)
        value = one["value"]
        if one["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif one["key"] == "lfsFile":
            files[value["path"]] = hub.large[value["oid"]]
    sha = hub.commit(repo, revision, files)
    where = f"http://{handler.headers['Host']}/{repo}/commit/{sha}"
    return _json({"commitUrl": where, "commitOid": sha})


def resolve(handler, hub, body, repo, revision, path):
    sha, files = hub.files(repo, revision)
    if path not in files:
        raise Refusal(404, "EntryNotFound")
    content = files[path]
    oid = hashlib.sha256(content).hexdigest()
    headers = {"X-Repo-Commit": sha, "ETag": f'"{oid[:40]}"'}
    if oid not in hub.large:
        return 200, headers, content
    where = f"http://localhost:{handler.server.server_port}/large/{oid}"  # another host
    linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": where}
    return 302, headers | linked, b""


def large(handler, hub, body, oid):
    assert not handler.headers.get("Authorization")  # the token is for the hub alone
    return 200, {"ETag": f'"{oid}"'}, hub.large[oid]


ROUTES = {
    r"POST /api/repos/create": create,
    r"POST /api/validate-yaml": validate,
    rf"GET /api/models{REPOSITORY}": info,
    rf"GET /api/models{REPOSITORY}/revision/(?P<revision>.+)": info,
    rf"POST /api/models{REPOSITORY}/preupload/(?P<revision>.+)": preupload,
    rf"POST {REPOSITORY}\.git/info/lfs/objects/batch": batch,
    r"PUT /upload/(?P<oid>\w+)": upload,
    rf"POST /api/models{REPOSITORY}/commit/(?P<revision>.+)": commit,
    rf"(?:GET|HEAD) {REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
    r"(?:GET|HEAD) /large/(?P<oid>\w+)": large,
}


@pytest.fixture
def settings(tmp_path):
    """settings(NAME=value, ...): sets variables of the environment, from which huggingface_hub
    reads its settings, here and in processes that are started. Its cache and home are new."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")
    pytest.importorskip("safetensors", reason="needs the extra hub")
    with pytest.MonkeyPatch.context() as patch:

        def change(**variables):
            for name, value in variables.items():
                patch.setenv(name, value)
            importlib.reload(constants)  # the library reads its environment when it is imported

        patch.delenv("HF_TOKEN", raising=False)
        home = str(tmp_path / "hf")
        # The protocol of Xet is compiled into another library, and this server does not speak it.
        change(HF_HOME=home, HF_HUB_CACHE=f"{home}/hub", HF_HUB_DISABLE_XET="1")
        yield change
    importlib.reload(constants)


@pytest.fixture
def hub(settings):
    """The hub that huggingface_hub talks to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    settings(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
