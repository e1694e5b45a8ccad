"""A Hub on this machine: repositories are folders, urls and headers are those of huggingface.co."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

TOKEN = "hf_secret"
COMMIT = "c0ffee" + "0" * 34
KIND = "(models|datasets)"


CONVERTED = "feed" + "0" * 36
"""Commit of the Hub's own conversion of a data set to parquet: here the folder beside it that ends in .converted."""


def folder_of(match, revision=None):
    """The folder of a repository below the root: data sets lie in `datasets/`."""
    converted = unquote(revision or "") in ("refs/convert/parquet", CONVERTED)
    return match[2] if match[1] == "models" else f"datasets/{match[2]}" + ".converted" * converted


class Hub:
    """Serves `root/owner/name/…`; repositories called private or gated need a token, `cut` files break off once."""

    def __init__(self, root: Path):
        self.root, self.requests, self.cut = root, [], {}

    def files(self, repo):
        folder = self.root / repo
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class Handler(BaseHTTPRequestHandler):
    """The few routes that downloading a snapshot and uploading a folder use."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def allowed(self, repo):
        """Whether the repository exists and may be seen; answers otherwise as the Hub does."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not (self.hub.root / repo).is_dir() or ("private" in repo and not has_token):
            self.reply(401 if not has_token else 404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif "gated" in repo and not has_token:
            self.reply(401, {"error": "gated"}, X_Error_Code="GatedRepo")
        else:
            return True
        return False

    def do_GET(self):
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(rf"/api/{KIND}/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = folder_of(match, match[3]), match[3]
            if not self.allowed(repo):
                return
            if not self.known(revision):
                return None
            siblings = [{"rfilename": name} for name in self.hub.files(repo)]
            return self.reply(
                200,
                {
                    "id": repo,
                    "sha": CONVERTED if repo.endswith(".converted") else COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                },
            )
        if match := re.fullmatch(rf"/api/{KIND}/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            folder = folder_of(match, match[3])
            if not self.allowed(folder) or not self.known(match[3]):
                return None
            below = unquote(match[4] or "/").strip("/")
            listed = [self.entry(folder, name) for name in self.hub.files(folder)]
            return self.reply(200, [row for row in listed if row["path"].startswith(below)])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            folder = (match[1] or "") + match[2] + ".converted" * (match[3] == CONVERTED)
            return self.allowed(folder) and self.file(self.hub.root / folder / unquote(match[4]))
        self.reply(404, {"error": path})

    do_HEAD = do_GET

    def known(self, revision):
        """Whether there is such a revision; answers otherwise as the Hub does."""
        found = unquote(revision or "main") in ("main", "v1", COMMIT, CONVERTED, "refs/convert/parquet")
        return found or self.reply(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")

    def entry(self, folder, name):
        """The Hub's entry of one path, a file or a folder."""
        path = self.hub.root / folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}

    def file(self, path):
        if not path.is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(content)
        etag = '"' + hashlib.sha1(content).hexdigest() + '"'
        part = content[start:stop]
        sent = part
        if self.command == "GET" and (n := self.hub.cut.pop(path.name, None)):
            sent, self.close_connection = part[:n], True
        headers = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes", "Content_Length": len(part)}
        if self.headers.get("Range"):
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.reply(206 if self.headers.get("Range") else 200, sent, **headers)

    def do_POST(self):
        self.hub.requests.append((self.command, self.path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if match := re.fullmatch(rf"/api/{KIND}/([^/]+/[^/]+)/paths-info/([^/]+)", self.path):
            folder, names = folder_of(match, match[3]), parse_qs(body.decode()).get("paths", [])
            there = [name for name in names if (self.hub.root / folder / name).exists()]
            if not self.allowed(folder) or not self.known(match[3]):
                return None
            return self.reply(200, [self.entry(folder, name) for name in there])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "log in"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            (self.hub.root / repo).mkdir(parents=True, exist_ok=True)
            (self.hub.root / f"{repo.replace('/', '--')}.json").write_text(body.decode())
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if match := re.match(r"/api/models/(.+)/commit/", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = self.hub.root / match[1] / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            return self.reply(
                200, {"commitUrl": f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        self.reply(404, {"error": self.path})


@contextmanager
def serve(root: Path):
    """A running Hub over `root`: `(hub, endpoint)`."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
