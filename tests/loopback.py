"""A Hub on this machine: as much of its HTTP interface as the official clients use to share a model repository.

Knows users only by one token. Faults are made on request: an answer of a given status, or a connection cut half way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
API = re.compile(r"^/api/models/([^/]+/[^/]+?)(?:/(revision|preupload|commit|tree|branch|tag|refs)(?:/([^/]+))?.*)?$")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE = re.compile(r"^/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """Commits by id, each all files by path; branches, tags and pull requests by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        name = hashlib.sha1(repr((sorted(files.items()), len(self.commits), ref)).encode()).hexdigest()
        self.commits[name], self.refs[ref] = files, name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


class Refused(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, code: str = "", headers: dict[str, str] | None = None, body: dict[str, str] | None = None
    ) -> None:
        self.body = json.dumps(body or {}).encode()
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}


class Hub:
    """The server: `with Hub() as hub`, then clients at `hub.url`; `hub.repos` is what it keeps."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.asked: list[str] = []  # "METHOD /path" of every request
        self.fail: dict[str, int] = {}  # part of "METHOD /path" -> status to answer with
        self.cut: dict[str, int] = {}  # file name -> bytes after which its next download is cut off, once
        hub = self

        class Handler(Connection):
            served = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def failing(self, request: str, status: int):
        self.fail[request] = status
        try:
            yield
        finally:
            del self.fail[request]


class Connection(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: tests read `Hub.asked`."""

    def serve(self) -> None:
        url = urlsplit(self.path)
        path, body = unquote(url.path), self._body()
        asked = f"{self.command} {path}"
        self.served.asked.append(asked)
        try:
            for part, status in self.served.fail.items():
                if part in asked:
                    raise Refused(status, "Fault")
            if match := FILE.match(url.path):
                self._file(*map(unquote, match.groups()))
            else:
                self._answer(200, json.dumps(self._api(url.path, parse_qs(url.query), body)).encode())
        except Refused as refused:
            self._answer(refused.status, refused.body, refused.headers)

    do_GET = do_POST = do_HEAD = do_DELETE = serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository:
        found = self.served.repos.get(name)
        if found is None or (found.private and not self._known()):
            raise Refused(404 if self._known() else 401, "RepoNotFound")
        return found

    def _must_be_known(self) -> None:
        if not self._known():
            raise Refused(401)

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> object:
        if path == "/api/whoami-v2":
            self._must_be_known()
            return {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := API.match(path):
            name, verb, revision = match.groups()
            return self._model(name, verb, unquote(revision or "main"), query, body)
        raise Refused(404)

    def _create(self, told: dict[str, str]) -> object:
        self._must_be_known()
        name = f"{told.get('organization') or 'user'}/{told['name']}"
        told_of = {"url": f"{self.served.url}/{name}", "name": name, "id": name}
        if name in self.served.repos:
            raise Refused(409, body=told_of)
        repo = self.served.repos[name] = Repository(told.get("visibility") == "private" or bool(told.get("private")))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        return told_of

    def _model(self, name: str, verb: str | None, revision: str, query: dict[str, list[str]], body: bytes) -> object:
        repo = self._repository(name)
        if verb in ("branch", "tag"):
            return self._ref(repo, verb, revision, json.loads(body or b"{}"))
        files = repo.files(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound")
        if verb == "preupload":
            return {"files": [_mode(told["path"], files) for told in json.loads(body)["files"]]}
        if verb == "commit":
            return self._commit(repo, name, dict(files), revision, "create_pr" in query, body)
        if verb == "tree":
            return [{"type": "file", "path": p, "size": len(b), "oid": _blob(b)} for p, b in sorted(files.items())]
        siblings = [{"rfilename": path} for path in sorted(files)]
        sha = repo.refs.get(revision, revision)
        return {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings,
                "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def _ref(self, repo: Repository, verb: str, name: str, told: dict[str, str]) -> object:
        self._must_be_known()
        made = told["tag"] if verb == "tag" else name
        if made in repo.refs:
            raise Refused(409)
        repo.refs[made] = repo.refs["main"] if verb == "branch" else repo.refs[name]
        return {}

    def _commit(
        self, repo: Repository, name: str, files: dict[str, bytes], revision: str, pull_request: bool, body: bytes
    ) -> object:
        self._must_be_known()
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        made = repo.commit(files, f"refs/pr/{len(repo.commits)}" if pull_request else revision)
        told = {"success": True, "commitOid": made, "commitUrl": f"{self.served.url}/{name}/commit/{made}"}
        more = {"pullRequestUrl": f"{self.served.url}/{name}/discussions/1"} if pull_request else {}
        return {**told, **more}

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._repository(name)
        files = repo.files(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound")
        commit = repo.refs.get(revision, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body, start = files[path], self._start()
        headers = {"ETag": f'"{_blob(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and path in self.served.cut:
            self._cut_off(body[start:], self.served.cut.pop(path), headers)
        else:
            self._answer(206 if start else 200, body[start:], headers)

    def _start(self) -> int:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(found[1]) if found else 0

    def _cut_off(self, body: bytes, after: int, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:after])
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def _mode(path: str, files: dict[str, bytes]) -> dict[str, object]:
    known = _blob(files[path]) if path in files else None
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": known}


def _validated(card: str) -> dict[str, list[str]]:
    """Refuses a card whose metadata are no YAML, or not such as the Hub wants."""
    told = yaml.safe_load(card.split("---")[1])
    named = NAME.fullmatch(told.get("base_model", "user/base"))
    if not named or not all(isinstance(tag, str) for tag in told.get("tags", [])):
        raise Refused(400)
    return {"errors": [], "warnings": []}


def _blob(body: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
