"""A small server on the loopback address that speaks the hub's download protocol, with faults on demand."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Serves {name: bytes}. break_after: close the connection after so many bytes of the next GET. requests:
    log.

    plain: leave out the hub's own headers, like a server that is none.
    """

    def __init__(self, files):
        self.files, self.break_after, self.requests, self.plain = files, None, [], False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, body):
                name = self.path.split("?")[0].rsplit("/", 1)[-1]
                hub.requests.append((self.command, name, self.headers.get("Range")))
                data = hub.files.get(name)
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = 0
                asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
                if asked:
                    start = int(asked[1])
                self.send_response(206 if asked else 200)
                if not hub.plain:
                    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                    self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("Accept-Ranges", "bytes")
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if body:
                    if hub.break_after is not None:
                        cut, hub.break_after = hub.break_after, None
                        self.wfile.write(data[start:start + cut])
                        self.wfile.flush()
                        self.close_connection = True
                        self.connection.close()
                    else:
                        self.wfile.write(data[start:])

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
