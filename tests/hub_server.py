"""A small server on loopback that speaks the Hub's protocol: create, preupload, LFS, commit, tree, ranges.

It keeps everything in memory. Each commit is a whole snapshot, so any revision can be asked for.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


class Hub:
    """Repositories by id; each is a list of commits, and each commit maps paths to bytes."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}  # what was uploaded as large files, by SHA-256
        self.requests: list[str] = []

    def create(self, repo: str) -> None:
        self.commits.setdefault(repo, [(hashlib.sha1(repo.encode()).hexdigest(), {})])

    def snapshot(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo)
        if commits is None:
            return None
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, repo: str, lines: list[dict]) -> str:
        files = dict(self.commits[repo][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        identifier = hashlib.sha1(repr((repo, len(self.commits[repo]), sorted(files))).encode()).hexdigest()
        self.commits[repo].append((identifier, files))
        return identifier


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        """Quiet."""

    def reply(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code):
        self.reply({"error": code}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = b""
            while size := int(self.rfile.readline(), 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return chunks
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, action in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, *match.groups())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def whoami(self):
        self.reply(
            {"type": "user", "name": "tester", "fullname": "tester", "orgs": [], "auth": {"type": "access_token"}}
        )

    def create(self):
        request = json.loads(self.body())
        repo = f"{request.get('organization') or 'tester'}/{request['name']}"
        self.hub.create(repo)
        self.reply({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})

    def valid_yaml(self):
        self.body()
        self.reply({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.reply({"files": modes, "commitOid": self.hub.snapshot(repo, revision)[0]})

    def lfs_batch(self, repo):
        objects = json.loads(self.body())["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.reply({})

    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        identifier = self.hub.commit(repo, lines)
        url = f"http://{self.headers['Host']}/{repo}/commit/{identifier}"
        self.reply({"success": True, "commitOid": identifier, "commitUrl": url, "hookOutput": ""})

    def info(self, repo, revision="main"):
        snapshot = self.hub.snapshot(repo, revision or "main")
        if snapshot is None:
            return self.missing("RepoNotFound" if repo not in self.hub.commits else "RevisionNotFound")
        siblings = [{"rfilename": path} for path in snapshot[1]]
        return self.reply({"id": repo, "modelId": repo, "sha": snapshot[0], "siblings": siblings, "tags": []})

    def tree(self, repo, revision, folder):
        snapshot = self.hub.snapshot(repo, revision)
        if snapshot is None:
            return self.missing("RepoNotFound" if repo not in self.hub.commits else "RevisionNotFound")
        prefix = f"{folder.strip('/')}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in snapshot[1].items()
            if path.startswith(prefix)
        ]
        return self.reply(entries) if entries or not prefix else self.missing("EntryNotFound")

    def resolve(self, repo, revision, path):
        snapshot = self.hub.snapshot(repo, revision)
        if snapshot is None:
            return self.missing("RepoNotFound" if repo not in self.hub.commits else "RevisionNotFound")
        identifier, files = snapshot
        headers = {"X_Repo_Commit": identifier, "Accept_Ranges": "bytes"}
        if path not in files:
            return self.reply({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound", **headers)
        content = files[path]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.reply(content, **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.reply(content[start : end + 1], 206, **headers)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.valid_yaml),
    (("POST",), rf"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(\w+)", Handler.lfs_upload),
    (("POST",), rf"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    (("GET",), rf"/api/models/{REPO}/tree/([^/]+)/?(.*)", Handler.tree),
    (("GET",), rf"/api/models/{REPO}(?:/revision/([^/]+))?", Handler.info),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub():
    """Starts a Hub on a free port of loopback; gives its address and its contents."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
