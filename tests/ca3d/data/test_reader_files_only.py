"""A file that only looks like a video must not make the reader open anything else."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from ca3d.data.av_frames import FILE_OPTIONS
from ca3d.data.reader import VideoError, check_file, open_video


class Listener:
    """A server that counts who calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            connection.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    yield server
    server.socket.close()


@pytest.fixture
def secret(tmp_path, write_video) -> Path:
    return write_video(tmp_path / "secret.ts", 10, codec="mpeg2video")


def scripts(target: str) -> dict[str, str]:
    return {
        "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
        f'<Period><AdaptationSet contentType="video"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "asx": f"[Reference]\nRef1={target}\n",
    }


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".m3u8", ".ts"])
@pytest.mark.parametrize("kind", list(scripts("")))
def test_scripts_are_refused(tmp_path, secret, listener, kind, suffix):
    for target in (str(secret), f"http://127.0.0.1:{listener.port}/a.ts", secret.name):
        path = tmp_path / f"{kind}{suffix}"
        path.write_text(scripts(target)[kind])
        with pytest.raises(VideoError, match="not a video file"):
            open_video(path)
        assert listener.calls == 0


@pytest.mark.parametrize("kind", ["ffconcat", "hls", "dash", "sdp"])
def test_the_decoder_itself_refuses_them_too(tmp_path, secret, listener, monkeypatch, kind):
    """Without the look at the first bytes, the list of containers still holds."""
    monkeypatch.setattr("ca3d.data.reader._is_container", lambda head: True)
    for target in (str(secret), f"http://127.0.0.1:{listener.port}/a.ts"):
        path = tmp_path / f"{kind}.m3u8"
        path.write_text(scripts(target)[kind])
        with pytest.raises(VideoError):
            open_video(path)
        assert listener.calls == 0


def test_these_scripts_do_work_without_the_locks(tmp_path, secret, listener):
    """The control: FFmpeg, asked plainly, opens what the scripts name."""
    (tmp_path / "list.m3u8").write_text(scripts(secret.name)["hls"])
    with av.open(str(tmp_path / "list.m3u8")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    (tmp_path / "list.ffconcat").write_text(scripts(secret.name)["ffconcat"])
    with av.open(str(tmp_path / "list.ffconcat")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    with pytest.raises((av.error.FFmpegError, OSError)):
        av.open(f"http://127.0.0.1:{listener.port}/a.ts")
    assert listener.calls > 0


def test_only_containers_are_on_the_list():
    names = set(FILE_OPTIONS["format_whitelist"].split(","))
    others = {
        "hls",
        "dash",
        "concat",
        "sdp",
        "rtsp",
        "rtp",
        "image2",
        "lavfi",
        "imf",
        "v4l2",
        "data",
    }
    assert not names & others
    assert FILE_OPTIONS["protocol_whitelist"] == "file"


def test_a_playlist_behind_a_transport_stream_byte(tmp_path):
    path = tmp_path / "half.ts"
    path.write_bytes(b"G#EXTM3U\n" + b"G" * 500)
    with pytest.raises(VideoError):
        open_video(check_file(path))
