"""A server with the part of the Hugging Face Hub's API that loading and uploading a model needs: it
serves the files of a folder as the repository `someone/model`, and stores uploaded files.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY, REVISION = "someone/model", "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(served: Path, uploaded: Path) -> Iterator[tuple[str, list[set[str]]]]:
    """Yields the server's address, for HF_ENDPOINT, and the file names of each commit so far."""
    made: list[set[str]] = []

    class Handler(_Handler):
        source, target, commits = served, uploaded, made

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    source: Path
    target: Path
    commits: list[set[str]]

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = sorted(
            str(file.relative_to(self.source)) for file in self.source.rglob("*") if file.is_file()
        )
        if path.startswith(f"/api/models/{REPOSITORY}/revision/") or (
            path == f"/api/models/{REPOSITORY}"
        ):
            siblings = [{"rfilename": name} for name in names]
            self._answer({"id": REPOSITORY, "sha": REVISION, "siblings": siblings})
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._answer([self._entry(name) for name in names])
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in names:
                self._refuse("EntryNotFound")
            else:
                content = (self.source / name).read_bytes()
                self._send(200, content, "application/octet-stream", self._entry(name)["oid"])
        else:
            self._refuse("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._answer({"url": f"/{REPOSITORY}", "id": REPOSITORY})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": file["path"], **how} for file in files]})
        elif "/commit/" in self.path:
            self.commits.append(set())
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.commits[-1].add(entry["value"]["path"])
                    file = self.target / entry["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            url = f"http://{self.headers['Host']}/{REPOSITORY}/commit/{REVISION}"
            self._answer({"success": True, "commitUrl": url, "commitOid": REVISION})
        else:
            self._answer({})

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.source / name).read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": digest}

    def _answer(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), "application/json")

    def _refuse(self, code: str) -> None:
        self._send(404, b"{}", "application/json", code=code)

    def _send(
        self, status: int, content: bytes, kind: str, tag: object = None, code: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", REVISION)
        if tag is not None:
            self.send_header("ETag", f'"{tag}"')
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
