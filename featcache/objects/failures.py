"""What an object store answers becomes one line: what failed, where, why, and what to do; or
a reason to try again."""

from __future__ import annotations

import re
from typing import NamedTuple

from featcache.errors import UserError, one_line
from featcache.objects.url import ObjectUrl

# a status, and the store's own word for the error in its XML or JSON
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>|\"(?:status|reason)\": ?\"([A-Za-z]{1,60})\"")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
# what a connection that was lost, or never made, is called by the HTTP library beneath
_LOST = (
    "error sending request",
    "connection reset",
    "connection closed",
    "operation timed out",
    "error decoding response body",
    "request or response body error",
    "unexpected eof",
    "incomplete message",
    "dns error",
)


class Answer(NamedTuple):
    """Holds what an error says: the status (0 where none came), the store's word for it, and a
    short text."""

    status: int
    code: str
    lost: bool

    @property
    def again(self) -> bool:
        """Return whether the same request may succeed a moment later."""
        return self.lost or self.status in _BUSY or self.code in ("SlowDown", "RequestTimeout")

    def __str__(self) -> str:
        words = [str(self.status)] * bool(self.status) + [self.code] * bool(self.code)
        return " ".join(words) or ("no connection" if self.lost else "an unknown error")


def read_answer(error: BaseException) -> Answer:
    """Read what obstore raised: status and code stand in its text alone."""
    text = str(error)[:20_000]
    status = _STATUS.search(text)
    code = _CODE.search(text)
    lost = status is None and any(word in text.lower() for word in _LOST)
    return Answer(
        int(status[1]) if status else 0, next(filter(None, code.groups()), "") if code else "", lost
    )


NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
CURES = {
    "NoSuchBucket": "there is no such bucket: correct its name, or make it",
    "ContainerNotFound": "there is no such container: correct its name, or make it",
    "InvalidBucketName": "the bucket's name is not allowed there: correct it",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key: set "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile",
    "InvalidAccessKeyId": "the access key is unknown there: set AWS_ACCESS_KEY_ID, the profile, or "
    "AWS_ENDPOINT_URL for another server",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, as by NTP",
    "AccessDenied": "these credentials may not do that: ask the bucket's owner, or take others",
    "ExpiredToken": "the session has ended: log in again",
    "PermanentRedirect": "the bucket lies in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_REGION",
}


def failure(url: ObjectUrl, doing: str, error: BaseException) -> UserError:
    """Return the line of a request that failed for good. No credentials are in it: of the store's
    answer only its status and its word are shown."""
    answer = read_answer(error)
    if answer.code in CURES:
        cure = CURES[answer.code]
    elif answer.status in (401, 403):
        cure = "no credentials, or none that may do that: set them by environment or profile"
    elif "169.254.169.254" in str(error) or "metadata.google" in str(error):
        cure = (
            "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS"
        )
    elif answer.lost:
        cure = "check the network and AWS_ENDPOINT_URL, and run the same command again"
    else:
        cure = "run the same command again; if it stays, ask who runs the store"
    return UserError(one_line(f"cannot {doing} {url}: {answer}; {cure}"))
