"""A small server that speaks the calls of the hub which an upload and a download need."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    "Repositories in memory: {name: {branch or commit: (commit, {path: content})}}."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Calls)
        self.repos, self.private, self.asked = {}, set(), []
        self.token = "hf_secret"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        "Add files to a branch; the name of the commit."
        repo = self.repos[name]
        content = dict(repo.get(branch, ("", {}))[1]) | files
        joined = b"".join(path.encode() + data for path, data in sorted(content.items()))
        commit = hashlib.sha1(joined + branch.encode()).hexdigest()
        repo[branch] = repo[commit] = (commit, content)
        return commit


class Calls(BaseHTTPRequestHandler):
    "One call."

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(self.body))
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in self.server.repos or (name in self.server.private and not self.known):
            return self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        if parts[0] == "api":
            return getattr(self, parts[4].replace("-", "_"), self.unknown)(name, *parts[5:])
        self.resolve(name, *parts[3:])

    do_POST = do_HEAD = do_GET

    def unknown(self, *_):
        self.answer(501, {"error": f"this server does not know {self.path}"})

    def create(self, wish: dict):
        name = f"{wish['organization']}/{wish['name']}"
        if not self.known:
            return self.answer(401, {"error": "who are you?"})
        if name in self.server.repos:
            return self.answer(409, {"error": "it is there", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = {}
        self.server.commit(name, "main", {".gitattributes": b""})
        if wish.get("visibility") == "private" or wish.get("private"):
            self.server.private.add(name)
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, name: str, branch: str):
        repo = self.server.repos[name]
        if branch in repo:
            return self.answer(409, {"error": "it is there"})
        repo[branch] = repo["main"]
        self.answer(200)

    def preupload(self, name: str, branch: str):
        if not self.known:
            return self.answer(403, {"error": "you may not write here"})
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
        self.answer(200, {"files": modes})

    def do_commit(self, name: str, branch: str):
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = self.server.commit(name, branch, files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self.answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    commit = do_commit

    def revision(self, name: str, revision: str):
        if revision not in self.server.repos[name]:
            return self.answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
        commit, files = self.server.repos[name][revision]
        siblings = [{"rfilename": path} for path in files]
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str):
        files = self.server.repos[name][revision][1]
        kept = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
        rows = [
            {"type": "file", "path": p, "size": len(files[p]), "oid": h} for p, h in kept.items()
        ]
        self.answer(200, rows)

    def resolve(self, name: str, revision: str, path: str):
        commit, files = self.server.repos[name][revision]
        if path not in files:
            return self.answer(404, {"error": "none"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self.answer(200, files[path], ETag=etag, X_Repo_Commit=commit)


@contextmanager
def hub_at(folder, monkeypatch):
    "The server, while the client of this process talks to it and keeps its cache in a folder."
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Html(BaseHTTPRequestHandler):
    "A proxy that answers everything with a page."

    def do_GET(self):
        page = b"<html>Please log in.</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass
