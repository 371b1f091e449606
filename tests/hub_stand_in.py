"""A stand-in of the Hugging Face hub on this machine: what huggingface_hub asks of it, served from memory."""

import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import urllib.parse

ID = "someone/hmar-tiny"
WEIGHTS = "model.safetensors"


class Hub:
    """What huggingface_hub asks of the hub, served from memory.

    Attributes:
      commits: commit → name → content. revisions: branch or tag → commit, of the one repository `ID`.
      requests: of files, in order, as (method, file, value of its Range header).
      breaks: what becomes of the next downloads of weights: `closed` or `reset` in the middle.
      answer: a (status, content) that goes before all others, or None.
    """

    def __init__(self):
        self.commits, self.revisions, self.requests, self.breaks, self.answer = {}, {}, [], [], None
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.store = f"http://localhost:{self._server.server_port}"  # to the client another host, as large files have

    def put(self, directory, *revisions, change=lambda files: None):
        """Serves the files of a model directory, changed, as a new commit that the revisions name."""
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        change(files)
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.revisions |= dict.fromkeys(revisions, commit)
        return commit

    def downloads(self, name=WEIGHTS):
        """The Range header, or None, of each download of a file."""
        return [span for method, file, span in self.requests if (method, file) == ("GET", name)]

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    def shutdown_request(self, request):
        self.close_request(request)  # without a polite end: a reset stays one


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.hub.answer:
            return self.send(*self.hub.answer)
        path = urllib.parse.urlparse(self.path).path
        if found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/(revision|tree)/(.+)", path):
            repository, what, revision = found.groups()
            if commit := self.commit(repository, revision):
                listing = [self.entry(name, content) for name, content in self.hub.commits[commit].items()]
                info = {"id": repository, "sha": commit, "siblings": [{"rfilename": file["path"]} for file in listing]}
                self.send(200, json.dumps(listing if what == "tree" else info))
        elif found := re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = found.groups()
            if commit := self.commit(repository, revision):
                self.resolve(commit, name)
        elif found := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            self.download(found[2], self.hub.commits[found[1]][found[2]])
        else:
            self.send(404, "")

    def entry(self, name, content):
        """A file in a listing: large ones, of which here are the weights, lie elsewhere."""
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name == WEIGHTS:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def commit(self, repository, revision):
        """The commit that a revision names, or None when an answer has been given."""
        revision = urllib.parse.unquote(revision)
        if repository != ID:
            return self.send(401, '{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
        if revision in self.hub.commits:
            return revision
        if revision not in self.hub.revisions:
            return self.send(404, '{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return self.hub.revisions[revision]

    def resolve(self, commit, name):
        content = self.hub.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self.send(404, "", headers | {"X-Error-Code": "EntryNotFound"})
        elif name == WEIGHTS:
            linked = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            self.send(302, "", headers | linked | {"Location": f"{self.hub.store}/cdn/{commit}/{name}"})
        else:
            self.download(name, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def download(self, name, content, headers=None):
        span = self.headers["Range"]
        self.hub.requests.append((self.command, name, span))
        if self.command == "GET" and name == WEIGHTS and self.hub.breaks:
            return self.break_off(content, self.hub.breaks.pop(0))
        if span is None:
            return self.send(200, content, headers)
        begin = int(re.fullmatch(r"bytes=(\d+)-", span)[1])
        part = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        return self.send(206, content[begin:], (headers or {}) | part)

    def send(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def break_off(self, content, how):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
