"""Uploading to the hub, against a stub of it on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from iterbatch.bench.export import push
from iterbatch.errors import RunError


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and a commit, and keeps what it was sent."""

    seen: list[tuple[str, str]] = []  # noqa: RUF012
    refuse = False

    def log_message(self, *words):
        """Nothing."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("utf-8")
        self.seen.append((self.path, body))
        url = f"http://{self.headers['Host']}/owner/name"
        if self.refuse:
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path.endswith("/repos/create"):
            self._answer(200, {"url": url, "name": "owner/name"})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            self._answer(200, {"success": True, "commitUrl": f"{url}/commit/1", "commitOid": "1" * 40})
        else:
            self._answer(200, {})

    def do_GET(self):
        self._answer(
            404 if "revision" not in self.path else 200, {"sha": "0" * 40, "id": "owner/name", "siblings": []}
        )

    def _answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    Hub.seen, Hub.refuse = [], False
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("# a card\n", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    return tmp_path


def test_every_file_is_in_one_commit_of_a_private_repository(hub, folder):
    assert "owner/name" in push(folder, "owner/name")
    created = next(json.loads(body) for path, body in hub.seen if path.endswith("/repos/create"))
    assert created.get("private") or created.get("visibility") == "private"
    commit = next(body for path, body in hub.seen if "/commit/" in path)
    sent = [json.loads(line) for line in commit.splitlines()]
    assert {each["value"]["path"] for each in sent if each["key"] == "file"} == {
        "README.md",
        "adapter_model.safetensors",
    }


def test_a_hub_that_refuses(hub, folder):
    hub.refuse = True
    with pytest.raises(
        RunError, match=r"is written, but could not be uploaded to 'owner/name'.*hf auth login"
    ):
        push(folder, "owner/name")
    with pytest.raises(RunError, match="could not be uploaded to 'not a name'"):
        push(folder, "not a name")
