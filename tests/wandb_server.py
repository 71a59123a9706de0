"""A stand-in for Weights & Biases' server: as much of it as a run takes to be made, resumed and sent its history."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Keeps what it is sent of one run.

    Args:
        status: of every answer; 401 or 403 refuses whoever asks.

    Attributes:
        url: for `WANDB_BASE_URL`.
        lines: of the history, by their place in it.
        summary: last values, by key.
        ids: of the runs that were made or resumed.
    """

    def __init__(self, status: int = 200):
        self.lines: dict[int, dict] = {}
        self.summary: dict = {}
        self.ids: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = outer._answer(self.path, body) if status == 200 else {"errors": [{"message": "refused"}]}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def history(self) -> list[dict]:
        """The last line of every `progress/step`, in their order, without W&B's own columns."""
        lines = [self.lines[place] for place in sorted(self.lines)]
        found = {line["progress/step"]: line for line in lines if "progress/step" in line}
        return [{key: value for key, value in found[s].items() if not key.startswith("_")} for s in sorted(found)]

    def _answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            if new := files.get("wandb-history.jsonl"):
                self.lines |= {new["offset"] + i: json.loads(line) for i, line in enumerate(new["content"])}
            if new := files.get("wandb-summary.json"):
                self.summary = json.loads(new["content"][-1])
        if path != "/graphql":
            return {}
        query = json.loads(body)
        return {"data": self._data(query["query"].split("(")[0].split()[1], query.get("variables") or {})}

    def _data(self, name: str, variables: dict) -> dict:
        project = {"id": "project", "name": "project", "entity": {"id": "team", "name": "team"}}
        bucket = {
            "id": "run",
            "name": variables.get("name"),
            "displayName": "run",
            "project": project,
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "summaryMetrics": json.dumps(self.summary),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": len(self.lines),
            "historyTail": json.dumps([json.dumps(self.lines[place]) for place in sorted(self.lines)[-1:]]),
        }
        if name == "Viewer":
            return {"viewer": {"id": "me", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": bucket} if self.lines else None}
        if name == "UpsertBucket":
            self.ids.add(variables["name"])
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.lines}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}
