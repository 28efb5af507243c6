"""Videos by URL: complete downloads are read, and every error names the URL."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from frostline.errors import DataError
from frostline.score.decoding import Chunk, End, Source, decoded
from frostline.video import write_video
from frostline.video.downloads import DownloadLimits, local_copy


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path == "/slow.mp4":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                try:
                    self.wfile.write(b"0")
                except OSError:
                    return
                time.sleep(0.1)
            return
        data = self.files.get(self.path)
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"") + (self.path == "/half.mp4")))
        self.end_headers()
        self.wfile.write(data or b"")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server with a video of three frames, half a video, a video that does not end, and a text."""
    video = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(video, torch.full((3, 3, 64, 64), 90, dtype=torch.uint8), lossless=True)
    Handler.files = {"/clip.mp4": video.read_bytes(), "/half.mp4": video.read_bytes(), "/text.mp4": b"text"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def error_of(url: str, limits: DownloadLimits) -> str:
    with pytest.raises(DataError) as raised, local_copy(url, limits):
        pass
    return str(raised.value)


def test_a_video_by_url_is_decoded_and_its_copy_deleted(url: str) -> None:
    sources = [Source(0, f"{url}/clip.mp4"), Source(1, f"{url}/text.mp4"), Source(2, f"{url}/missing.mp4")]
    with decoded(sources, 1, None) as events:
        first, *ends = events
    assert isinstance(first, Chunk) and first.frames.shape == (3, 3, 64, 64)
    assert all(isinstance(end, End) for end in ends) and [end.key for end in ends] == [0, 1, 2]
    # The error names the URL, not the local copy.
    assert ends[0].error == "" and ends[1].error.startswith(f"{url}/text.mp4: ")
    assert "returned 404" in ends[2].error and ends[2].error.startswith(f"{url}/missing.mp4: ")
    with local_copy(f"{url}/clip.mp4", DownloadLimits()) as copy:
        assert Path(copy).read_bytes() == Handler.files["/clip.mp4"]
    assert not Path(copy).exists()


def test_a_local_path_is_its_own_copy() -> None:
    with local_copy("clip.mp4", DownloadLimits(0, 0)) as copy:
        assert copy == "clip.mp4"


def test_limits(url: str) -> None:
    assert "is larger than 0.0001 MB (--max-download-size)" in error_of(f"{url}/clip.mp4", DownloadLimits(0.0001))
    said = error_of(f"{url}/slow.mp4", DownloadLimits(seconds=0.5))
    assert said.startswith(f"{url}/slow.mp4: ") and "--download-timeout" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file:///etc/passwd", "use the path of a local file, not a URL"),
        ("http://127.0.0.1:1/a.mp4", "cannot be downloaded"),
        ("http://[/a.mp4", "this URL cannot be downloaded"),
        ("nothing://a/b.mp4", "this URL cannot be downloaded"),
    ],
)
def test_what_cannot_be_downloaded(name: str, said: str) -> None:
    message = error_of(name, DownloadLimits())
    assert message.startswith(f"{name}: ") and said in message


def test_half_a_video_is_none(url: str) -> None:
    assert "cannot be downloaded" in error_of(f"{url}/half.mp4", DownloadLimits())
