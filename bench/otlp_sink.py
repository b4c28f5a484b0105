"""A collector that accepts OTLP over HTTP and discards it, so that benchmarks can run with traces enabled.

usage: otlp_sink.py PORT. GET / returns the number of exports and of bytes received.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    exports = 0
    size = 0

    def do_POST(self):
        length = int(self.headers.get("content-length", 0))
        while length > 0:
            piece = self.rfile.read(min(length, 1 << 16))
            if not piece:
                break
            length -= len(piece)
            Sink.size += len(piece)
        Sink.exports += 1
        # An empty ExportTraceServiceResponse means that everything was accepted.
        self.answer(b"", "application/x-protobuf")

    def do_GET(self):
        self.answer(f"{Sink.exports} {Sink.size}\n".encode(), "text/plain")

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Sink).serve_forever()
