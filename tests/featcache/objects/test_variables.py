"""Variables of S3's own tools change the requests, as a server sees them; what a server refuses is
one line, with what to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from featcache.errors import UserError
from featcache.objects.client import client
from featcache.objects.url import parse

# as Amazon's reference of errors has them: status, and code
REFUSED = {
    "skew": (403, "RequestTimeTooSkewed"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
    "region": (400, "AuthorizationHeaderMalformed"),
    "bucket": (404, "NoSuchBucket"),
    "odd": (403, "\x1b[31mOdd"),
}
TOLD = {
    "skew": "403 RequestTimeTooSkewed; this machine's clock is wrong: set it",
    "expired": "400 ExpiredToken; the session has ended: log in again",
    "denied": "403 AccessDenied; these credentials may not do that",
    "region": "the bucket lies in another region: set AWS_REGION",
    "bucket": "there is no such bucket: correct its name, or make it",
    "odd": "403; no credentials, or none that may do that",
}
Seen = list[tuple[str, dict[str, str]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Paths and headers of requests to a server that has nothing."""
    found: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            self.send_response(404)
            self.end_headers()

        def do_GET(self) -> None:
            status, code = REFUSED[self.path.rpartition("/")[2]]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-central-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def ask() -> None:
    assert client(parse("s3://lab/a/b")).facts("a/b") is None


def test_requests_are_signed_and_name_the_bucket_in_the_path(seen: Seen) -> None:
    ask()
    path, headers = seen[-1]
    assert path == "/lab/a/b"
    assert "Credential=key/" in headers["authorization"]
    assert "/eu-central-1/s3/" in headers["authorization"]
    assert "x-amz-request-payer" not in headers


def test_requester_pays(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_PAYER", "true")
    ask()
    assert seen[-1][1]["x-amz-request-payer"] == "requester"


def test_a_public_bucket_is_read_without_credentials(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    ask()
    assert "authorization" not in seen[-1][1]


def test_the_bucket_in_the_name_of_the_host(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    ask()
    assert seen[-1][0] == "/a/b"


@pytest.mark.parametrize("case", TOLD)
def test_what_a_server_refuses_is_one_line(seen: Seen, case: str) -> None:
    with pytest.raises(UserError) as caught:
        client(parse(f"s3://lab/{case}")).read(case)
    text = str(caught.value)
    assert text.startswith(f"cannot read s3://lab/{case}: ")
    assert TOLD[case] in text
    assert text.isprintable()
    assert "secret" not in text


@pytest.mark.parametrize(
    ("url", "name", "value", "told"),
    [
        ("az://lab/x", "AZURE_NOTHING", "1", "set the variables .*AZURE_STORAGE_ACC"),
        ("gs://lab/x", "GOOGLE_SERVICE_ACCOUNT_KEY", "{", "set the variables .*GOOGLE_APPL"),
        ("s3://lab/x", "AWS_SKIP_SIGNATURE", "perhaps", "set the variables .*AWS_ACCESS_KEY_ID"),
    ],
)
def test_variables_that_are_wrong_are_one_line(
    url: str, name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told) as caught:
        client(parse(url)).facts("x")
    assert str(caught.value).startswith(url[:8])
    assert "\n" not in str(caught.value)
