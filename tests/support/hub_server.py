"""A server that speaks the part of the Hugging Face Hub's API that an upload needs.

It answers huggingface_hub's real client: who a token belongs to, whether a repository exists,
creating one, and a commit with small files inside and large files by Git LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.local_server import Handler, served

TOKEN = "hf_test_token"


@dataclass
class Repository:
    """One repository.

    Attributes:
        private: Whether only its owner sees it.
        files: Content by path.
        commits: Number of commits since it was created.
    """

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        url: The endpoint.
        repositories: By OWNER/NAME.
        requests: Method and path of each request, in order.
        refuse: Path of a request (its end) -> status that is sent for it.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of the answer to a request."""
        for end, status in self.refuse.items():
            if path.endswith(end):
                return status, {"error": f"refused {end}"}
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        plain = bool(body) and not path.endswith("/commit/main")  # A commit has several lines.
        content: Any = json.loads(body) if plain else None
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(content)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": list(map(self._lfs, content["objects"]))}
        return self._of_repository(method, path, content, body)

    def _create(self, content: dict[str, Any]) -> tuple[int, Any]:
        name = f"{content['organization']}/{content['name']}"
        url = {"url": f"{self.url}/{name}"}
        if content["organization"] != "me":
            return 403, {"error": "You don't have the rights to create a model there"}
        if name in self.repositories:
            return 409, url | {"error": "You already created this model repo"}
        private = content.get("visibility") == "private" or content.get("private") is True
        self.repositories[name] = Repository(private, {".gitattributes": b"* text=auto\n"})
        return 200, url

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}
        return {**wanted, "actions": {"upload": upload}}

    def _of_repository(self, method: str, path: str, content: Any, body: bytes) -> tuple[int, Any]:
        name = path.removeprefix("/api/models/")
        name = name.removesuffix("/preupload/main").removesuffix("/commit/main")
        found = self.repositories.get(name)
        if found is None:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            large = (".safetensors", "tokenizer.json")
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in content["files"]
                ]
            }
        if path.endswith("/commit/main"):
            self._commit(found, [json.loads(line) for line in body.splitlines()])
            oid = hashlib.sha1(body).hexdigest()
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}
        siblings = [{"rfilename": file} for file in found.files]
        return 200, {"id": name, "private": found.private, "siblings": siblings, "sha": "0" * 40}

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        repository.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                blob = self.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                repository.files[value["path"]] = blob
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve on a free port of this machine inside the context."""
    hub = Hub()

    class HubHandler(Handler):
        def _answer(self) -> None:
            body = self.read_body()
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.answer(self.command, path, token, body)
            answer = json.dumps(content).encode()
            headers = [("Content-Type", "application/json")]
            if status == 404:
                headers.append(("X-Error-Code", "RepoNotFound"))
            self.send_head(status, len(answer), headers)
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

    with served(HubHandler) as hub.url:
        yield hub
