import pytest

from ca3d.errors import UserError
from ca3d.watch.credentials import Credentials, find_credentials, redact, split_url
from ca3d.watch.request import Request


@pytest.mark.parametrize(
    "text",
    [
        "[Errno 111] Connection refused: 'rtsp://ann:S3cr3t@camera/a'",
        "rtsp://ann:S3cr3t@camera:554/a?channel=1",
        "rtsp://ann:a@b/S3cr3t@camera/a",
        "rtsp://camera/user=ann&password=S3cr3t&channel=1.sdp",
        "rtsp://camera/a?PWD=S3cr3t",
        "RTSPS://ann:S3cr3t@camera/a: no answer",
        "plain text with S3cr3t in it",
        "rtsp://camera/a?access_token=S3cr3t&b=1",
        "rtsp://camera/a?pw=S3cr3t",
    ],
)
def test_redacted(text):
    hidden = redact(text, ["S3cr3t"])
    assert "S3cr3t" not in hidden
    assert "***" in hidden
    assert redact(hidden, ["S3cr3t"]) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "ann:S3cr3t@camera/a: no such file",
        "rtsp:/ann:S3cr3t@camera/a: no such file",
        "unrecognized arguments: rtsp://ann:S3cr3t@camera/a",
    ],
)
def test_redacted_without_knowing_the_password(text):
    assert "S3cr3t" not in redact(text)


@pytest.mark.parametrize(
    "address", ["ann:S3cr3t[x@camera:1/a", "ann:S3cr3t#x@camera/a", "ann:12#S3cr3t@camera/a",
                "camera:99999/a", "camera:S3cr3t/a"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_without_quoting_it(address):
    with pytest.raises(UserError, match="belongs into --credentials") as refused:
        split_url(f"rtsp://{address}")
    assert "S3cr3t" not in str(refused.value)


def test_options_and_times_are_no_secrets():
    text = "file.yaml, line 3: keys=published at 12:30 is not allowed; mail ann@example.org"
    assert redact(text) == text


def test_what_is_no_secret_stays():
    text = "rtsp://camera.local:554/stream?channel=1: nothing listens there"
    assert redact(text, ["", "ab"]) == text


def test_quoted_forms_of_a_password_are_hidden():
    assert "p%40ss" not in redact("x p%40ss%2Fword y", ["p@ss/word"])


def test_an_address_is_split():
    bare, credentials = split_url("rtsp://ann:p%40ss@camera:554/a?b=c")
    assert bare == "rtsp://camera:554/a?b=c"
    assert (credentials.user, credentials.password) == ("ann", "p@ss")


def test_a_request_hides_them_and_gives_them_to_the_decoder_only():
    request = Request("rtsp", "rtsp://camera/a", credentials=Credentials("ann", "p@ss/w"))
    assert request.url == "rtsp://ann:p%40ss%2Fw@camera/a"
    assert "p@ss" not in repr(request)
    assert "ann" not in repr(request)
    assert Request.from_json(request.to_json()) == request


def test_file(tmp_path):
    file = tmp_path / "camera.txt"
    file.write_text("ann:with:colon\n")
    file.chmod(0o600)
    found = find_credentials(str(file), {"CA3D_CAMERA_USER": "bob"})
    assert (found.user, found.password) == ("ann", "with:colon")


def test_environment():
    found = find_credentials(None, {"CA3D_CAMERA_USER": "bob", "CA3D_CAMERA_PASSWORD": "x"})
    assert (found.user, found.password) == ("bob", "x")
    assert not find_credentials(None, {})


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_refused(tmp_path, mode):
    file = tmp_path / "camera.txt"
    file.write_text("ann:secret")
    file.chmod(mode)
    with pytest.raises(UserError, match="chmod 600") as caught:
        find_credentials(str(file))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "ann", ":secret", "ann:secret\nbob:secret"])
def test_a_malformed_file_is_refused_without_quoting_it(tmp_path, text):
    file = tmp_path / "camera.txt"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UserError, match="user:password") as caught:
        find_credentials(str(file))
    assert "secret" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(UserError, match="No such file"):
        find_credentials("missing.txt")
