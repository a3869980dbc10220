"""EC2's metadata service as a spot instance sees it: python tests/infra/ec2_metadata.py PORT NOTICE

It answers those alone who fetched a token from it, and tells the notice when there is such a file.
"""

import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ec2Metadata(ThreadingHTTPServer):
    def __init__(self, port: int, notice: Path) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.notice, self.tokens = notice, set()


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self):
        if self.path != "/latest/api/token" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            self._answer(400)
            return
        token = secrets.token_hex(8)
        self.server.tokens.add(token)
        self._answer(200, token)

    def do_GET(self):
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            self._answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice.exists():
            self._answer(200, self.server.notice.read_text())
        else:
            self._answer(404)

    def _answer(self, status, text=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    Ec2Metadata(int(sys.argv[1]), Path(sys.argv[2])).serve_forever()
