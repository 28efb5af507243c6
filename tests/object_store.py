"""An S3 server in this process with the requests that pyarrow's client sends: objects in memory, no signatures."""

import email.utils
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class ObjectStore(ThreadingHTTPServer):
    """Objects by `/bucket/key`; every bucket exists."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def variables(self) -> dict[str, str]:
        """Return the environment variables with which a client uses this server."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
        return {"AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1", **keys}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server within the block."""
    with ObjectStore() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._object()

    def do_GET(self) -> None:
        path, query = self._asked()
        if path.count("/") == 1 or "list-type" in query:
            self._list(path, query)
        else:
            self._object()

    def do_PUT(self) -> None:
        path, query = self._asked()
        body = self._body()
        if source := self.headers.get("x-amz-copy-source"):
            body = self.server.objects["/" + unquote(source).lstrip("/")]
        if "uploadId" in query:
            self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.server.objects[path] = body
        tag = _tag(body)
        if source:
            self._xml(f"<CopyObjectResult {NAMESPACE}><ETag>{escape(tag)}</ETag></CopyObjectResult>")
        else:
            self._answer(200, b"", {"ETag": tag})

    def do_POST(self) -> None:
        path, query = self._asked()
        body = self._body().decode()
        if "uploads" in query:
            upload = str(len(self.server.uploads))
            self.server.uploads[upload] = {}
            name = "InitiateMultipartUploadResult"
            self._xml(f"<{name} {NAMESPACE}><UploadId>{upload}</UploadId></{name}>")
        elif "uploadId" in query:
            parts = self.server.uploads.pop(query["uploadId"])
            self.server.objects[path] = b"".join(parts[number] for number in sorted(parts))
            self._xml(f"<CompleteMultipartUploadResult {NAMESPACE}><ETag>x</ETag></CompleteMultipartUploadResult>")
        else:
            for key in re.findall("<Key>(.*?)</Key>", body):
                self.server.objects.pop(f"{path.rstrip('/')}/{key}", None)
            self._xml(f"<DeleteResult {NAMESPACE}></DeleteResult>")

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._asked()[0], None)
        self._answer(204, b"")

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        return unquote(parts.path), {name: values[0] for name, values in query.items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return _without_chunks(body) if "aws-chunked" in self.headers.get("Content-Encoding", "") else body

    def _object(self) -> None:
        path, _ = self._asked()
        data = self.server.objects.get(path)
        if data is None:
            code = 200 if path.rstrip("/").count("/") == 1 else 404
            return self._answer(code, b"")
        headers = {
            "ETag": _tag(data),
            "Last-Modified": email.utils.formatdate(0, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], headers)
        return self._answer(200, data, headers)

    def _list(self, path: str, query: dict[str, str]) -> None:
        bucket, prefix, delimiter = path.strip("/"), query.get("prefix", ""), query.get("delimiter", "")
        keys = [
            name.removeprefix(f"/{bucket}/") for name in self.server.objects if name.startswith(f"/{bucket}/{prefix}")
        ]
        folders = {
            prefix + key.removeprefix(prefix).split("/")[0] + "/"
            for key in keys
            if delimiter and delimiter in key.removeprefix(prefix)
        }
        files = sorted(key for key in keys if not (delimiter and delimiter in key.removeprefix(prefix)))
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>"
            f"<Size>{len(self.server.objects[f'/{bucket}/{key}'])}</Size></Contents>"
            for key in files
        )
        found += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        count = len(files) + len(folders)
        self._xml(
            f"<ListBucketResult {NAMESPACE}><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )

    def _xml(self, text: str) -> None:
        self._answer(200, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(), {"Content-Type": "application/xml"})

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _without_chunks(body: bytes) -> bytes:
    """Return the content of a chunked body, in which each chunk follows a line with its size."""
    content, rest = b"", body
    while True:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            return content
        content, rest = content + rest[:size], rest[size + 2 :]
